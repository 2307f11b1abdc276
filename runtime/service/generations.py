"""The generation requests of one HTTP request: started, awaited, streamed and cancelled together."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

from stageline.runtime.generation.request import MAX_CHOICES, Completion, Delta, GenerationRequest, TokenLogprob
from stageline.runtime.generation.stream import Generation
from stageline.runtime.service.errors import ApiError
from stageline.runtime.service.model import Model
from stageline.runtime.service.noted import note_generation


class Generations:
    """One request per prompt, in the order of the prompts. The holder must cancel it."""

    def __init__(self) -> None:
        self._all: list[Generation] = []
        self._prompt_tokens = self._new_tokens = 0

    @classmethod
    async def start(
        cls, model: Model, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], deadline_s: float | None
    ) -> Self:
        """Start one request per prompt. QueueFullError if the pipeline has no permit for the first; the others wait for
        theirs. RequestError for a sampling parameter out of its range."""
        asked = dict(sampling)
        if asked["temperature"] is None:
            asked["temperature"] = model.temperature
        requests = [model.pipeline.request(prompt, deadline_s=deadline_s, **asked) for prompt in prompts]
        if len(prompts) * requests[0].sampling.n > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts with n choices each are more than {MAX_CHOICES}; send fewer")
        if requests[0].sampling.structure is not None:
            await asyncio.to_thread(model.pipeline.prepare, requests[0])
        started = cls()
        started._prompt_tokens = sum(map(len, prompts))
        try:
            started._add(requests[0], model.pipeline.start(requests[0], wait=False))
            for request in requests[1:]:
                started._add(request, await model.pipeline.astart(request))
        except BaseException:
            started.cancel()
            raise
        return started

    def _add(self, request: GenerationRequest, generation: Generation) -> None:
        self._all.append(generation)
        note_generation(request, generation)

    async def completions(self) -> list[Completion]:
        """Wait for all of them. If one fails or the waiting task is cancelled, all are cancelled."""
        try:
            return await asyncio.gather(*(generation.aresult() for generation in self._all))
        finally:
            self.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield the pieces of all requests as they come, each with its prompt's number. Closing it cancels them all."""
        sources = [aiter(generation) for generation in self._all]
        coming = {asyncio.ensure_future(anext(source, None)): number for number, source in enumerate(sources)}
        try:
            while coming:
                ready, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
                for task in ready:
                    number = coming.pop(task)
                    piece = task.result()
                    if piece is None:
                        continue
                    coming[asyncio.ensure_future(anext(sources[number], None))] = number
                    self._new_tokens += len(piece.token_ids)
                    yield number, piece
        finally:
            for task in coming:
                task.cancel()
            self.cancel()

    def prompt_logprobs(self, number: int) -> list[TokenLogprob | None]:
        """Those of a prompt, once a piece of it has come."""
        return self._all[number].prompt_logprobs

    def usage(self) -> dict[str, int]:
        """Token counts of the prompts and of the pieces so far."""
        return _counts(self._prompt_tokens, self._new_tokens)

    def finished(self) -> list[Completion]:
        """All completions, once `pieces` has ended."""
        return [generation.result() for generation in self._all]

    def cancel(self) -> None:
        """Stop the unfinished requests; their slots are free at the next step."""
        for generation in self._all:
            generation.cancel()


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Token counts under OpenAI's names. A prompt counts once, however many choices it has."""
    prompt, new = (sum(getattr(c, name) for c in completions) for name in ("prompt_tokens", "completion_tokens"))
    cached = sum(c.cached_tokens for c in completions)
    return {**_counts(prompt, new), "prompt_tokens_details": {"cached_tokens": cached}}


def _counts(prompt: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

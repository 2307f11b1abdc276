"""/v1/completions: continues prompts, given as texts or token ids, and says how likely these were."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from stageline.runtime.generation.detokenize import TextStream
from stageline.runtime.generation.request import Choice, Completion, TokenLogprob
from stageline.runtime.service.errors import ApiError, json_response
from stageline.runtime.service.fill_in import FillIn
from stageline.runtime.service.generations import Generations, usage
from stageline.runtime.service.logprobs import by_token, joined, of_completion, of_prompt
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import CompletionRequest, each
from stageline.runtime.service.server_sent_events import EventStream
from starlette.responses import Response


@dataclass(frozen=True)
class _Prompt:
    """A prompt's tokens; what is put before each text, and what of that each token is, where that is asked for."""

    ids: list[int]
    text: str = ""
    texts: tuple[str, ...] = ()


async def complete(model: Model, body: CompletionRequest) -> Response:
    """Respond with whole texts, or start to stream them. Choice c of prompt p has the index p x n + c."""
    prompts = await asyncio.to_thread(_prompts, model, body)
    ids = [prompt.ids for prompt in prompts]
    generations = await Generations.start(model, ids, body.sampling, body.deadline_s)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return await EventStream.begin(_chunks(model, body, prompts, generations, head), model.pipeline)
    completions = await generations.completions()
    choices = await asyncio.to_thread(_choices, model, body, prompts, completions)
    return json_response({**head, "choices": choices, "usage": usage(completions)})


def _choices(
    model: Model, body: CompletionRequest, prompts: Sequence[_Prompt], completions: Sequence[Completion]
) -> list[dict[str, Any]]:
    """Beside the event loop: log probabilities of long texts take their time."""
    return [
        {
            "index": index,
            "text": prompt.text + choice.text,
            "logprobs": _logprobs(model, body, prompt, completion.prompt_logprobs, choice),
            "finish_reason": choice.finish_reason,
            **_of_prompt(model, body, completion),
        }
        for index, (prompt, completion, choice) in enumerate(
            (prompt, completion, choice)
            for prompt, completion in zip(prompts, completions, strict=True)
            for choice in completion.choices
        )
    ]


def _prompts(model: Model, body: CompletionRequest) -> list[_Prompt]:
    given = each(body.prompt)
    if not given:
        raise ApiError(400, "prompt is an empty list; give a text", param="prompt")
    for text in (*given, body.suffix):
        if isinstance(text, str):
            model.perhaps_fitting(text)
    if body.suffix is not None:
        prompts = [_Prompt(_fill_in(model).ids(one, body.suffix)) for one in given]
    else:
        prompts = [_echoed(model, one) if body.echo else _Prompt(_ids(model, one)) for one in given]
    for prompt in prompts:
        model.fitting(prompt.ids)
    return prompts


def _fill_in(model: Model) -> FillIn:
    found = FillIn.of(model.encoder)
    if found is None:
        message = f"the model {model.name!r} has no tokens to fill in the middle with, such as <|fim_prefix|>"
        raise ApiError(400, f"{message}; leave suffix out", param="suffix")
    return found


def _ids(model: Model, prompt: str | list[int]) -> list[int]:
    return model.encoder.ids(prompt) if isinstance(prompt, str) else prompt


def _echoed(model: Model, prompt: str | list[int]) -> _Prompt:
    """The prompt with its text: as it was given, or that of its tokens, of which special ones have none."""
    if isinstance(prompt, str):
        ids, texts = model.encoder.pieces(prompt)
        return _Prompt(ids, prompt, tuple(texts))
    stream, texts = TextStream(model.encoder), []
    for token in prompt:
        stream.push((token,))
        texts.append(stream.added)
    if texts:
        texts[-1] += stream.finish()
    return _Prompt(prompt, "".join(texts), tuple(texts))


def _of_prompt(model: Model, body: CompletionRequest, completion: Completion) -> dict[str, Any]:
    if body.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": by_token(model, completion.prompt_logprobs, body.prompt_logprobs)}


def _logprobs(
    model: Model, body: CompletionRequest, prompt: _Prompt, of_its: Sequence[TokenLogprob | None], choice: Choice
) -> dict[str, Any] | None:
    if body.logprobs is None:
        return None
    drawn = of_completion(model, choice.logprobs, len(prompt.text))
    if not body.echo:
        return drawn
    known = [one and replace(one, top=one.top[: body.logprobs]) for one in of_its]  # more may be asked for elsewhere
    return joined(of_prompt(model, prompt.texts, prompt.ids, known), drawn)


async def _chunks(
    model: Model,
    body: CompletionRequest,
    prompts: Sequence[_Prompt],
    generations: Generations,
    head: dict[str, Any],
) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice its prompt, if it is to be echoed, then its text in pieces; then the usage, if asked for."""
    if body.stream_options.include_usage:
        head = {**head, "usage": None}

    def chunk(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        so_far = {"usage": generations.usage()} if body.stream_options.continuous_usage_stats else {}
        return {**head, "choices": [choice], **so_far}

    offsets: dict[int, int] = {}
    async with aclosing(generations.pieces()) as pieces:
        async for number, piece in pieces:
            index, prompt = number * body.n + piece.choice, prompts[number]
            if index not in offsets:
                offsets[index] = len(prompt.text)
                if body.echo:
                    found = generations.prompt_logprobs(number)
                    known = None if body.logprobs is None else of_prompt(model, prompt.texts, prompt.ids, found)
                    yield chunk(index, prompt.text, known, None)
            logprobs = None if body.logprobs is None else of_completion(model, piece.logprobs, offsets[index])
            offsets[index] += sum(len(token.text) for token in piece.logprobs)
            if piece.text or logprobs or piece.finish_reason:
                yield chunk(index, piece.text, logprobs, piece.finish_reason)
    if body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage(generations.finished())}

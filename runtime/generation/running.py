"""A request while it is generated: its choices, the tokens and text of each, and what it ends as."""

from dataclasses import dataclass, field, replace

from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.detokenize import TextStream
from stageline.runtime.generation.request import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
)
from stageline.runtime.generation.sampling import Drawn, Row
from stageline.runtime.generation.settings import Settings
from stageline.runtime.generation.stream import Generation
from stageline.runtime.generation.text_model import TextModel


@dataclass(eq=False, slots=True)
class RunningChoice:
    """One continuation of a job, with its tokens and its text."""

    job: "Job"
    number: int
    continuation: Continuation
    row: Row
    text: TextStream | None
    max_tokens: int
    written: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def drawn(self) -> list[int]:
        """The tokens drawn so far."""
        return self.continuation.tokens[self.continuation.prompt_length :]

    def add(self, drawn: Drawn, end_ids: tuple[int, ...]) -> Delta:
        """Write a token down; its piece has a reason to finish if it is the last."""
        token, settings = drawn.token_id, self.job.settings
        self.continuation.tokens.append(token)
        text = added = ""
        if token in end_ids or token in settings.stop_token_ids:
            self.finish_reason = "stop"
        elif self.text is not None:
            text = self.text.push([token])
            added = self.text.added
            if self.text.stopped:
                self.finish_reason = "stop"
        count = len(self.continuation.tokens) - self.continuation.prompt_length
        if self.finish_reason is None and count >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None and not self.text.stopped:
            text += self.text.finish()
            added += self.text.added
        self.written.append(text)
        logprobs = () if drawn.logprob is None else (replace(drawn.logprob, text=added),)
        self.logprobs.extend(logprobs)
        return Delta(self.number, text, (token,), logprobs, self.finish_reason)


@dataclass(eq=False, slots=True)
class Job:
    """A request that was submitted. Times are those of `perf_counter`, in seconds."""

    request: GenerationRequest
    settings: Settings
    prompt: list[int]
    generation: Generation
    submitted_at: float
    number: int = 0
    choices: list[RunningChoice] = field(default_factory=list)
    started_at: float | None = None
    first_token_at: float | None = None
    token_times: list[float] = field(default_factory=list)
    """When each token of the first choice came."""

    def begin(self, text_model: TextModel, capacity: int) -> None:
        """Make its choices, for caches of `capacity` tokens; all but the first follow the first one's prompt."""
        settings = self.settings
        room = capacity - len(self.prompt) + 1  # the last token drawn is not put into the cache
        max_tokens = room if settings.max_tokens is None else min(room, settings.max_tokens)
        leader = None
        for number in range(settings.n):
            continuation = Continuation(list(self.prompt), len(self.prompt), leader)
            leader = leader or continuation
            row = Row(settings, text_model.vocabulary, self.prompt, text_model.defaults.end_ids, number)
            encoder = text_model.encoder
            text = None if encoder is None else TextStream(encoder, settings.stop, settings.min_tokens, self.prompt)
            self.choices.append(RunningChoice(self, number, continuation, row, text, max_tokens))

    def completion(self, now: float) -> Completion:
        """What it ends as, once every choice has finished."""
        assert self.first_token_at is not None
        return Completion(
            tuple(
                Choice("".join(c.written), tuple(c.drawn), c.finish_reason or "length", tuple(c.logprobs))
                for c in self.choices
            ),
            len(self.prompt),
            self.choices[0].continuation.shared,
            (self.started_at or now) - self.submitted_at,
            self.first_token_at - self.submitted_at,
            now - self.submitted_at,
            tuple(at - self.submitted_at for at in self.token_times),
        )

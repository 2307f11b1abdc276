"""A request while it is generated: its choices, the tokens and text of each, and what it ends as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.detokenize import TextStream
from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.reasoned import RowMatcher
from stageline.runtime.generation.request import (
    Choice,
    Completion,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
)
from stageline.runtime.generation.sampling import Row, logprob
from stageline.runtime.generation.settings import Settings
from stageline.runtime.generation.stream import Generation, Piece
from stageline.runtime.generation.text_model import TextModel

Text = tuple[str, str]
"""What of a choice's text is certain with a token, and what the token adds to it, stops included."""


@dataclass(eq=False, slots=True)
class RunningChoice:
    """One continuation of a job, with its tokens and its text.

    Each of its tokens is first taken, then written; the next ones may be taken before it is written.
    """

    job: "Job"
    number: int
    continuation: Continuation
    row: Row
    text: TextStream | None
    max_tokens: int
    ends: frozenset[int]
    """The tokens that end it."""
    finish_reason: FinishReason | None = None
    """Once its last token is taken."""
    _written: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def drawn(self) -> int:
        """How many tokens are drawn so far."""
        return len(self.continuation.tokens) - self.continuation.prompt_length

    def take(self, token: int) -> Text | None:
        """Note a token that was drawn, and decide whether it is the last. Its text, if that had to be made for it."""
        tokens = self.continuation.tokens
        tokens.append(token)
        if token in self.ends:
            self.finish_reason = "stop"
            return None
        made = None
        if self.text is not None and self.text.may_stop:
            made = self._pushed(token)
            if self.text.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and self.row.complete:
            self.finish_reason = "stop"
        if self.finish_reason is None and len(tokens) - self.continuation.prompt_length >= self.max_tokens:
            self.finish_reason = "length"
        return made

    def take_nothing(self) -> None:
        """End it without a token."""
        self.finish_reason = "length"

    def write(
        self, token: int | None, reason: FinishReason | None, made: Text | None, logits: NDArray[np.float32] | None
    ) -> Piece:
        """Make the piece of a token that was taken, by its `reason` the last; `made`: what `take` returned. Its log
        probability is that of `logits` [vocabulary]. None: the piece of a choice without tokens."""
        if token is None:
            return self.number, "", (), (), reason
        text, added = made or self._pushed(token)
        if reason is not None and self.text is not None and not self.text.stopped:
            text += self.text.finish()
            added += self.text.added
        self._written.append(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if logits is not None:
            assert self.row.settings.logprobs is not None
            logprobs = (replace(logprob(logits, token, self.row.settings.logprobs), text=added),)
            self._logprobs.extend(logprobs)
        return self.number, text, (token,), logprobs, reason

    def choice(self) -> Choice:
        """What it is, once it is written to its end."""
        tokens = self.continuation.tokens[self.continuation.prompt_length :]
        return Choice("".join(self._written), tuple(tokens), self.finish_reason or "length", tuple(self._logprobs))

    def _pushed(self, token: int) -> Text:
        if self.text is None or token in self.ends:
            return "", ""
        text = self.text.push((token,))
        return text, self.text.added


@dataclass(eq=False, slots=True)
class Job:
    """A request that was submitted. Times are those of `perf_counter`, in seconds."""

    request: GenerationRequest
    settings: Settings
    prompt: list[int]
    generation: Generation
    submitted_at: float
    matcher: RowMatcher | None = None
    """What the structure of its choices starts from."""
    number: int = 0
    choices: list[RunningChoice] = field(default_factory=list)
    unfinished: int = 0
    """Choices of which the last token is not written."""
    started_at: float | None = None
    token_times: list[float] = field(default_factory=list)
    """When each token of the first choice came."""

    def begin(
        self, text_model: TextModel, capacity: int, drafter: Callable[[Sequence[int]], Lookup] | None = None
    ) -> None:
        """Make its choices, for caches of `capacity` tokens; all but the first follow the first one's prompt. `drafter`
        makes what drafts for a row of tokens; None: nothing does."""
        settings = self.settings
        self.unfinished = settings.n
        end_ids = () if settings.ignore_eos else text_model.defaults.end_ids
        ends = frozenset((*end_ids, *settings.stop_token_ids))
        room = capacity - len(self.prompt) + 1  # the last token drawn is not put into the cache
        max_tokens = room if settings.max_tokens is None else min(room, settings.max_tokens)
        if settings.prompt_logprobs is not None:
            self.generation.prompt_logprobs.append(None)
        leader = None
        for number in range(settings.n):
            scores = leader is None and settings.prompt_logprobs is not None
            tokens = list(self.prompt)
            lookup = drafter(tokens) if drafter is not None and settings.speculation else None
            most = len(tokens) + max_tokens
            continuation = Continuation(tokens, len(tokens), leader, scores, self.request.priority, lookup, most)
            leader = leader or continuation
            matcher = None if self.matcher is None else self.matcher.copy()
            row = Row(settings, text_model.vocabulary, self.prompt, text_model.defaults.end_ids, number, matcher)
            encoder = text_model.encoder
            given = settings.stop, settings.min_tokens, self.prompt, settings.shown_token_ids
            text = None if encoder is None else TextStream(encoder, *given)
            self.choices.append(RunningChoice(self, number, continuation, row, text, max_tokens, ends))

    def score(self, first: int, logits: NDArray[np.float32]) -> None:
        """Note how likely the prompt's tokens from `first` on are, by logits [tokens, vocabulary]."""
        count = self.settings.prompt_logprobs
        assert count is not None
        tokens = self.prompt[first : first + len(logits)]
        self.generation.prompt_logprobs += [
            logprob(row, token, count) for row, token in zip(logits, tokens, strict=True)
        ]

    def completion(self, now: float) -> Completion:
        """What it ends as, once every choice has finished."""
        return Completion(
            tuple(choice.choice() for choice in self.choices),
            len(self.prompt),
            self.choices[0].continuation.shared,
            (self.started_at or now) - self.submitted_at,
            (self.token_times[0] if self.token_times else now) - self.submitted_at,
            now - self.submitted_at,
            tuple(at - self.submitted_at for at in self.token_times),
            self.submitted_at,
            self.number,
            tuple(self.generation.prompt_logprobs),
        )

"""What a user asks of generation, checked once, and what comes back."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from stageline.models.errors import RequestError

FinishReason = Literal["stop", "length"]
"""Why a choice ended: an end token or a stop of the user's; or `max_tokens` or the cache's capacity."""
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a choice ends. RequestError for a value out of its range.

    A token is drawn from the logits after, in this order: `repetition_penalty` (CTRL: a seen token's logit is divided
    by it if positive, else multiplied; prompt and output), `presence_penalty` and `frequency_penalty` (OpenAI:
    subtracted once, and once per occurrence, for output tokens), `temperature` (0: the likeliest, nothing is drawn),
    `top_k` (0: off), `top_p` (1: off), `min_p` (0: off; a fraction of the likeliest's probability).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens whatever else is in flight; choice i of n draws from `seed + i`."""
    max_tokens: int | None = None
    """None: until an end token, a stop, or the cache's capacity."""
    min_tokens: int = 0
    """Until N tokens, no end token and no stop ends the choice: end and stop tokens are not drawn."""
    stop: tuple[str, ...] = ()
    """Texts that end a choice; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside each token drawn, 0 to 20; None: no logprobs at all."""
    n: int = 1
    """How many choices, which share the prompt's cache."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            whole = name in _WHOLE
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise RequestError(f"{name} is {value!r}; give {'a whole' if whole else 'a finite'} number")
            if not low <= value <= high:
                raise RequestError(f"{name} is {value}; give {low} to {high}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; lower it")
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError(f"more than {MAX_STOPS} stops were given; give fewer")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop holds {stop!r}; give texts that are not empty")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise RequestError(f"stop_token_ids holds {token!r}; give token ids")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From keywords, lists taken for tuples and a single stop for one of them. RequestError for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"unknown sampling parameter {name!r}; known: {', '.join(known)}")
        given = dict(values)
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        for name in ("stop", "stop_token_ids"):
            if name in given:
                if given[name] is not None and not isinstance(given[name], (list, tuple)):
                    raise RequestError(f"{name} is {given[name]!r}; give a list")
                given[name] = tuple(given[name] or ())
        return cls(**given)


_MOST = 2**31 - 1
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, _MOST),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("seed", 0, 2**64 - 1),
    ("max_tokens", 1, _MOST),
    ("min_tokens", 0, _MOST),
    ("logprobs", 0, MAX_LOGPROBS),
    ("n", 1, MAX_CHOICES),
)
_MAY_BE_NONE = frozenset({"seed", "max_tokens", "logprobs"})
_WHOLE = frozenset({"top_k", "seed", "max_tokens", "min_tokens", "logprobs", "n"})


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, as text (special tokens in it are taken for what they are) or as token ids, and how to continue it.

    `deadline_s`: seconds from submission after which it fails with DeadlineError, wherever it is.
    """

    prompt: str | tuple[int, ...]
    sampling: Sampling = Sampling()
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not (
            isinstance(self.deadline_s, (int, float)) and 0 < self.deadline_s < math.inf
        ):
            raise RequestError(f"deadline_s is {self.deadline_s!r}; give a number of seconds above 0")


@dataclass(frozen=True)
class TokenLogprob:
    """A token drawn, its log probability (of the model's own logits, before temperature, penalties and cuts, float64
    log-softmax), and the likeliest tokens at its place as (id, logprob), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What one choice has new. Its texts joined are the choice's text; a piece may be empty where it ends the choice
    or where its tokens do not make whole characters yet. str() returns the text."""

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Choice:
    """One continuation. `token_ids` holds all that were drawn, the end token included; `text` ends before a stop."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """All choices of a request. `cached_tokens` of the prompt were found in the cache and not computed again."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int
    queue_s: float
    """From submission to the first step that works on it."""
    ttft_s: float
    """From submission to the first token of the first choice."""
    total_s: float
    token_times_s: tuple[float, ...] = field(default=(), repr=False)
    """When each token of choice 0 came, from submission."""

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn, over all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def __str__(self) -> str:
        return self.text

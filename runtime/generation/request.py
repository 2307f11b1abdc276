"""What a user asks of generation, checked once, and what comes back."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from stageline.models.errors import RequestError
from stageline.runtime.generation.structure import Structure

FinishReason = Literal["stop", "length"]
"""Why a choice ended: an end token or a stop of the user's; or `max_tokens` or the cache's capacity."""
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a choice ends. RequestError for a value out of its range.

    None: as the checkpoint says (`GenerationDefaults`), or off where it says nothing. A token is drawn from the logits
    after, in this order: `sequence_bias` (added to the logit of a sequence's last token where the others stand before
    it), `repetition_penalty` (CTRL: a seen token's logit is divided by it if positive, else multiplied; prompt and
    output; 1: off), `presence_penalty` and `frequency_penalty` (OpenAI: subtracted once, and once per occurrence, for
    output tokens), `no_repeat_ngram_size` (no N tokens come twice, prompt included; 0: off), `bad_words_ids` (sequences
    that may not come), `suppress_tokens` and, for the first token, `begin_suppress_tokens` (tokens that may not come),
    `temperature` (0: the likeliest, nothing is drawn), `top_k` (0: off), `top_p` (1: off), `min_p` (0: off; a fraction
    of the likeliest's probability).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens whatever else is in flight; choice i of n draws from `seed + i`."""
    max_tokens: int | None = None
    """None: as the checkpoint says, else until an end token, a stop, or the cache's capacity. 0, nothing at all, only
    with `prompt_logprobs`."""
    min_tokens: int | None = None
    """Until N tokens, no end token and no stop ends the choice: end and stop tokens are not drawn."""
    stop: tuple[str, ...] | None = None
    """Texts that end a choice; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Whether the checkpoint's end tokens do not end a choice."""
    speculation: bool = True
    """Whether steps may compute drafts of its next tokens, where the pipeline has drafts; the tokens are the same."""
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside each token drawn, 0 to 20; None: no logprobs at all."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt, all of which is computed then, whatever a cache holds of it."""
    n: int = 1
    """How many choices, which share the prompt's cache."""
    no_repeat_ngram_size: int | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    """Pairs of a sequence of token ids and its bias."""
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    shown_token_ids: tuple[int, ...] = ()
    """Special tokens of which the text has the spelling, as of other tokens."""
    structure: Structure | None = None
    """What the text must look like; the choice ends where nothing may follow, even before `min_tokens`."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name not in _NEVER_NONE:
                continue
            whole = name in _WHOLE
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise RequestError(f"{name} is {value!r}; give {'a whole' if whole else 'a finite'} number")
            if name == "max_tokens" and self.prompt_logprobs is not None:
                low = 0
            if not low <= value <= high:
                raise RequestError(f"{name} is {value}; give {low} to {high}")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; lower it")
        for name in ("ignore_eos", "speculation"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give True or False")
        stops = self.stop or ()
        if len(stops) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError(f"more than {MAX_STOPS} stops were given; give fewer")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop holds {stop!r}; give texts that are not empty")
        for name, tokens in (
            ("stop_token_ids", self.stop_token_ids),
            ("shown_token_ids", self.shown_token_ids),
            ("suppress_tokens", self.suppress_tokens or ()),
            ("begin_suppress_tokens", self.begin_suppress_tokens or ()),
            *(("bad_words_ids", word or (None,)) for word in self.bad_words_ids or ()),
            *(("sequence_bias", sequence or (None,)) for sequence, _ in self.sequence_bias or ()),
        ):
            for token in tokens:
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise RequestError(f"{name} holds {token!r}; give token ids")
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise RequestError(f"structure is {self.structure!r}; give a Structure, such as Structure.regex('[0-9]+')")
        for sequence, bias in self.sequence_bias or ():
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
                raise RequestError(f"sequence_bias of {list(sequence)} is {bias!r}; give a finite number")

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
        for name in _LISTS:
            if given.get(name) is not None:
                given[name] = _tuples(name, given[name])
        for name in ("stop_token_ids", "shown_token_ids"):
            if given.get(name, ()) is None:
                given[name] = ()
        return cls(**given)


def _tuples(name: str, value: Any) -> tuple[Any, ...]:
    """A list as a tuple, and the lists that `name` holds as well. RequestError if it is not one."""
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} is {value!r}; give a list")
    if name == "bad_words_ids":
        return tuple(_tuples("a word of bad_words_ids", word) for word in value)
    if name == "sequence_bias":
        for pair in value:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise RequestError(f"sequence_bias holds {pair!r}; give pairs of token ids and a bias")
        return tuple((_tuples("a sequence of sequence_bias", ids), bias) for ids, bias in value)
    return tuple(value)


_LISTS = (
    "stop", "stop_token_ids", "shown_token_ids", "sequence_bias", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip


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
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("n", 1, MAX_CHOICES),
    ("no_repeat_ngram_size", 0, _MOST),
)
_WHOLE = frozenset(
    {"top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "n", "no_repeat_ngram_size"}
)
_NEVER_NONE = frozenset({"temperature", "presence_penalty", "frequency_penalty", "n"})


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, as text (special tokens in it are taken for what they are) or as token ids, and how to continue it.

    `deadline_s`: seconds from submission after which it fails with DeadlineError, wherever it is. `priority`: of
    requests that wait for a slot those with the lowest go first, and of these the one that came first.
    """

    prompt: str | tuple[int, ...]
    sampling: Sampling = Sampling()
    deadline_s: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not (
            isinstance(self.deadline_s, (int, float)) and 0 < self.deadline_s < math.inf
        ):
            raise RequestError(f"deadline_s is {self.deadline_s!r}; give a number of seconds above 0")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise RequestError(f"priority is {self.priority!r}; give a whole number, the lower the sooner")


@dataclass(frozen=True)
class TokenLogprob:
    """A token drawn, or of a prompt, its log probability (of the model's own logits, before temperature, penalties and
    cuts, float64 log-softmax), and the likeliest tokens at its place as (id, logprob), likeliest first. `text` is what
    it adds to the text, stops included: none for a special token, and for one that leaves a character unfinished; the
    token that finishes it has the whole. Tokens of a prompt have none."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text: str = ""


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
    """From submission to the first token of the first choice; to the end, without tokens."""
    total_s: float
    token_times_s: tuple[float, ...] = field(default=(), repr=False)
    """When each token of choice 0 came, from submission."""
    submitted_s: float = field(default=0.0, repr=False, compare=False)
    """When it was submitted, by `time.perf_counter`."""
    number: int = field(default=-1, repr=False, compare=False)
    """Of the requests in the order of their arrival, as a Recorder counts them."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = field(default=(), repr=False)
    """Of each token of the prompt, None for the first, which nothing precedes; empty unless they were asked for."""

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

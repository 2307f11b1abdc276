"""What a request asks for, with what it leaves open taken from the checkpoint: every value decided."""

from dataclasses import dataclass, fields

from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.generation.request import Sampling


@dataclass(frozen=True)
class Settings(Sampling):
    """A Sampling in which nothing is left to the checkpoint: only `seed`, `max_tokens` (the cache's capacity),
    `logprobs`, `prompt_logprobs` and `structure` may be None."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()


def decide(asked: Sampling, defaults: GenerationDefaults, prompt_tokens: int) -> Settings:
    """`asked`, completed from `defaults` for a prompt of `prompt_tokens` tokens.

    As in transformers' `generate`, `max_new_tokens` goes before `max_length` and `min_new_tokens` before `min_length`.
    RequestError where the prompt leaves no room below the checkpoint's `max_length`.
    """
    values = {field.name: getattr(asked, field.name) for field in fields(Sampling)}
    stated = {
        **dict(defaults),
        "stop": defaults.stop_strings,
        "max_tokens": _length(defaults.max_new_tokens, defaults.max_length, prompt_tokens),
        "min_tokens": _length(defaults.min_new_tokens, defaults.min_length, prompt_tokens),
    }
    for name, value in values.items():
        if value is None:
            values[name] = stated.get(name)
    limit = values["max_tokens"]
    if asked.max_tokens is None and limit is not None and limit < 1:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, and the checkpoint's max_length is {defaults.max_length}; "
            "give max_tokens"
        )
    if asked.min_tokens is None and values["min_tokens"] is not None:
        values["min_tokens"] = max(0, min(values["min_tokens"], values["min_tokens"] if limit is None else limit))
    if asked.max_tokens is None and limit is not None:
        values["max_tokens"] = max(limit, values["min_tokens"] or 0)
    return Settings(**{name: value for name, value in values.items() if value is not None})


def _length(new: int | None, whole: int | None, prompt_tokens: int) -> int | None:
    """A limit of the output, in tokens, from one of the output or of prompt and output."""
    return new if new is not None else None if whole is None else whole - prompt_tokens

"""Log probabilities in the formats of chats and of completions, the end token included."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stageline.runtime.generation.request import TokenLogprob
from stageline.runtime.service.model import Model

_MIN = -9999.0  # OpenAI's value for an impossible token: JSON has no infinity
_HALF = "\ufffd"  # in the text of a token that is a part of a character


def of_chat(model: Model, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Each token with its bytes (null if it is a part of a character) and the most probable alternatives. The tokens
    joined are the text: one that leaves a character unfinished is empty, and the one that finishes it has the whole."""

    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(logprob, _MIN), "bytes": None if _HALF in text else list(text.encode())}

    content = [
        {
            **one(_name(model, drawn, drawn.token_id), drawn.logprob),
            "top_logprobs": [one(_name(model, drawn, token), logprob) for token, logprob in drawn.top],
        }
        for drawn in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(model: Model, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Lists of tokens and their log probabilities. `offset`: characters of the choice before these tokens."""
    lengths = [len(drawn.text) for drawn in tokens]
    return {
        "tokens": [_name(model, drawn, drawn.token_id) for drawn in tokens],
        "token_logprobs": [max(drawn.logprob, _MIN) for drawn in tokens],
        "top_logprobs": [
            {_name(model, drawn, token): max(logprob, _MIN) for token, logprob in drawn.top} for drawn in tokens
        ],
        "text_offset": [offset + sum(lengths[:place]) for place in range(len(tokens))],
    }


def of_prompt(
    model: Model, texts: Sequence[str], tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> dict[str, Any]:
    """The same of a prompt, of which each token has a text. The first one's log probability is null."""
    known = [replace(one, text=text) for one, text in zip(logprobs, texts, strict=True) if one is not None]
    found = of_completion(model, known, len(texts[0]))
    first = model.special_name(tokens[0])
    before = {
        "tokens": [texts[0] if first is None else first],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
    return joined(before, found)


def by_token(model: Model, tokens: Sequence[TokenLogprob | None], most: int) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each token of a prompt, by token id, its log probability and those of the `most`
    likeliest. The rank of one that is not among these is not known."""

    def one(known: TokenLogprob) -> dict[str, dict[str, Any]]:
        top = known.top[:most]
        ranks = {token: place for place, (token, _) in enumerate(known.top, 1)}
        return {
            str(token): {
                "logprob": max(logprob, _MIN),
                "rank": ranks.get(token),
                "decoded_token": model.special_name(token) or model.token_text(token),
            }
            for token, logprob in {known.token_id: known.logprob, **dict(top)}.items()
        }

    return [None if known is None else one(known) for known in tokens]


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The lists of a completion's tokens, one after the other."""
    return {name: [*values, *after[name]] for name, values in before.items()}


def _name(model: Model, drawn: TokenLogprob, token: int) -> str:
    """The drawn token as it stands in the text, a special token's name, or an alternative as it would stand there."""
    special = model.special_name(token)
    if special is not None:
        return special
    return drawn.text if token == drawn.token_id else model.token_text(token)

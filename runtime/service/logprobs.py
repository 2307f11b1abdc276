"""Log probabilities in the formats of chats and of completions, the end token included."""

from collections.abc import Sequence
from typing import Any

from stageline.runtime.generation.request import TokenLogprob
from stageline.runtime.service.model import Model

_MIN = -9999.0  # OpenAI's value for an impossible token: JSON has no infinity
_HALF = "\ufffd"  # in the text of a token that is a part of a character


def of_chat(model: Model, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Each token with its bytes (null if it is a part of a character) and the most probable alternatives."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = model.token_text(token)
        return {"token": text, "logprob": max(logprob, _MIN), "bytes": None if _HALF in text else list(text.encode())}

    return {
        "content": [{**one(t.token_id, t.logprob), "top_logprobs": [one(*other) for other in t.top]} for t in tokens],
        "refusal": None,
    }


def of_completion(model: Model, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Lists of tokens and their log probabilities. `offset`: characters of the choice before these tokens."""
    texts = [model.token_text(token.token_id) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, _MIN) for token in tokens],
        "top_logprobs": [{model.token_text(i): max(logprob, _MIN) for i, logprob in token.top} for token in tokens],
        "text_offset": [offset + sum(map(len, texts[:place])) for place in range(len(texts))],
    }

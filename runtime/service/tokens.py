"""/tokenize and /detokenize, in vLLM's shapes."""

import asyncio
from typing import Any

from stageline.runtime.service.errors import json_response
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from starlette.responses import Response


async def tokenize(model: Model, body: TokenizeRequest | TokenizeChatRequest) -> Response:
    """Respond with the token ids of a text, or of the prompt that messages make."""
    ids = await asyncio.to_thread(_ids, model, body)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = model.encoder.names(ids)
    return json_response(answer)


async def detokenize(model: Model, body: DetokenizeRequest) -> Response:
    """Respond with the text of token ids, special tokens by their names."""
    text = await asyncio.to_thread(model.encoder.decode, body.tokens, True)
    return json_response({"prompt": text})


def _ids(model: Model, body: TokenizeRequest | TokenizeChatRequest) -> list[int]:
    if isinstance(body, TokenizeRequest):
        return model.encoder.ids(body.prompt, body.add_special_tokens)
    return model.pipeline.chat_ids([message.for_template for message in body.messages], **body.template_variables)

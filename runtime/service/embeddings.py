"""/v1/embeddings: turns texts or token ids into vectors."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from stageline.models.errors import RequestError
from stageline.models.tokenizer import padded
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.engines import Array
from stageline.runtime.service.errors import ApiError, as_json
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import EmbeddingRequest, each
from starlette.responses import Response

MAX_INPUTS = 2048  # OpenAI's limit
_INPUT_TYPES = {
    "query": ("query", "search_query"), "search_query": ("query", "search_query"),
    "passage": ("passage", "document", "search_document"), "document": ("document", "passage", "search_document"),
    "search_document": ("document", "passage", "search_document"), "": (),
}  # fmt: skip
"""Cohere's and NVIDIA's names of what a text is -> names of prompts in sentence-transformers' files."""


async def embed(model: Model, body: EmbeddingRequest) -> Response:
    """Respond with a float32 vector for each input, as numbers or as little-endian bytes in base64."""
    inputs = await asyncio.to_thread(arrays, model, body)
    counts = inputs["attention_mask"].sum(axis=1)
    names = {spec.name for spec in model.pipeline.signature.inputs}
    given = {name: array for name, array in inputs.items() if name in names}
    future = model.pipeline.submit(given, [EMBEDDING], wait=False)
    vectors = (await asyncio.wrap_future(future))[EMBEDDING]
    return Response(
        await asyncio.to_thread(_answer, model, body, vectors, int(counts.sum())), media_type="application/json"
    )


def check_count(texts: Sequence[Any], param: str) -> None:
    """ApiError unless there are 1 to MAX_INPUTS texts in the parameter."""
    if not 1 <= len(texts) <= MAX_INPUTS:
        raise ApiError(400, f"{param} holds {len(texts)} texts; send 1 to {MAX_INPUTS}", param=param)


def arrays(model: Model, body: EmbeddingRequest) -> dict[str, Array]:
    """The model's inputs by name, int64 [inputs, length]."""
    given = each(body.input)
    check_count(given, "input")
    limit = body.truncate_prompt_tokens
    truncate = body.truncate or limit is not None
    limit = None if limit in (None, -1) else limit
    if isinstance(given[0], str):
        prompt = body.prompt_name if body.input_type is None else _prompt_of(model, body.input_type, body.prompt_name)
        return dict(model.encoder.encode(given, truncate=truncate, prompt=prompt, limit=limit))
    if body.prompt_name is not None:
        raise ApiError(400, "prompt_name is for texts; put the prompt's tokens before the others", param="prompt_name")
    most = min(model.length, limit or model.length)
    rows = [row[:most] if truncate else model.fitting(row) for row in given]
    for place, row in enumerate(rows):
        if not row:
            raise RequestError(f"input {place} has no tokens; give some")
    ids, mask = padded(rows, model.encoder.pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def _prompt_of(model: Model, input_type: str, prompt: str | None) -> str | None:
    """The name of the model's prompt for texts of this type; None where it has none at all, or the type says nothing.
    ApiError where a model with prompts has none for it."""
    names = model.encoder.prompt_names
    wanted = _INPUT_TYPES.get(input_type, (input_type,))
    if prompt is not None or not names or not wanted:
        return prompt
    for name in wanted:
        if name in names:
            return name
    known = f"this model's prompts are {', '.join(names)}"
    raise ApiError(400, f"there is no prompt for input_type {input_type!r}; {known}", param="input_type")


def cut(vectors: Array, dimensions: int) -> Array:
    """The first `dimensions` numbers of vectors [inputs, width], each vector with length one again."""
    width = vectors.shape[1]
    if dimensions > width:
        raise ApiError(400, f"dimensions is {dimensions}, the model's vectors have {width}", param="dimensions")
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    result: Array = cut / np.where(lengths == 0, 1, lengths)
    return result


def written(values: Array, encoding: Literal["float", "base64"]) -> Any:
    """Numbers as lists, or their bytes, little-endian float32, in base64."""
    if encoding == "float":
        return values.tolist()
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _answer(model: Model, body: EmbeddingRequest, vectors: Array, tokens: int) -> bytes:
    if body.dimensions is not None:
        vectors = cut(vectors, body.dimensions)

    data = [
        {"object": "embedding", "index": i, "embedding": written(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": model.name, "usage": usage})

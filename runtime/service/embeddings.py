"""/v1/embeddings: turns texts or token ids into vectors."""

import asyncio
import base64
from typing import Any

from stageline.models.errors import RequestError
from stageline.models.tokenizer import padded
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.engines import Array
from stageline.runtime.service.errors import ApiError, as_json
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import EmbeddingRequest, each
from starlette.responses import Response

MAX_INPUTS = 2048  # OpenAI's limit


async def embed(model: Model, body: EmbeddingRequest) -> Response:
    """Respond with a float32 vector for each input, as numbers or as little-endian bytes in base64."""
    inputs = await asyncio.to_thread(_arrays, model, body)
    counts = inputs["attention_mask"].sum(axis=1)
    names = {spec.name for spec in model.pipeline.signature.inputs}
    given = {name: array for name, array in inputs.items() if name in names}
    future = model.pipeline.submit(given, [EMBEDDING], wait=False)
    vectors = (await asyncio.wrap_future(future))[EMBEDDING]
    return Response(
        await asyncio.to_thread(_answer, model, body, vectors, int(counts.sum())), media_type="application/json"
    )


def _arrays(model: Model, body: EmbeddingRequest) -> dict[str, Array]:
    """The model's inputs by name, int64 [inputs, length]."""
    given = each(body.input)
    if not 1 <= len(given) <= MAX_INPUTS:
        raise ApiError(400, f"input holds {len(given)} texts; send 1 to {MAX_INPUTS}", param="input")
    if isinstance(given[0], str):
        return dict(model.encoder.encode(given, truncate=body.truncate, prompt=body.prompt_name))
    if body.prompt_name is not None:
        raise ApiError(400, "prompt_name is for texts; put the prompt's tokens before the others", param="prompt_name")
    rows = [row[: model.length] if body.truncate else model.fitting(row) for row in given]
    for place, row in enumerate(rows):
        if not row:
            raise RequestError(f"input {place} has no tokens; give some")
    ids, mask = padded(rows, model.encoder.pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def _answer(model: Model, body: EmbeddingRequest, vectors: Array, tokens: int) -> bytes:
    def written(vector: Array) -> Any:
        if body.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": written(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": model.name, "usage": usage})

"""/pooling, vLLM's: what a model computes of a text as it is: its vector, those of its tokens, or its scores."""

import asyncio
import time
import uuid
from typing import Any, Literal

from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.engines import Array
from stageline.runtime.scores import scores
from stageline.runtime.service.embeddings import arrays, cut, written
from stageline.runtime.service.errors import ApiError, as_json
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import EmbeddingRequest
from starlette.responses import Response

_HIDDEN = "last_hidden_state"
Task = Literal["embed", "token_embed", "classify"]
_OUTPUTS: dict[Task, str] = {"embed": EMBEDDING, "classify": "logits", "token_embed": _HIDDEN}


class PoolingRequest(EmbeddingRequest):
    """/pooling"""

    task: Task | None = None
    """None: the first of `embed` and `classify` that the model does."""


async def pool(model: Model, body: PoolingRequest) -> Response:
    """Respond with float32 numbers for each input: [width], [tokens, width] or [labels]."""
    names = {spec.name for spec in model.pipeline.signature.outputs}
    done = [task for task, output in _OUTPUTS.items() if output in names]
    task = body.task or done[0]
    if task not in done:
        raise ApiError(400, f"the model {model.name!r} does {' and '.join(done)}, not {task}", param="task")
    if body.dimensions is not None and task != "embed":
        raise ApiError(400, "dimensions is for the task embed; leave it out", param="dimensions")
    inputs = await asyncio.to_thread(arrays, model, body)
    given = {spec.name: inputs[spec.name] for spec in model.pipeline.signature.inputs if spec.name in inputs}
    future = model.pipeline.submit(given, [_OUTPUTS[task]], wait=False)
    values = (await asyncio.wrap_future(future))[_OUTPUTS[task]]
    counts = inputs["attention_mask"].sum(axis=1).tolist()
    return Response(await asyncio.to_thread(_answer, model, body, task, values, counts), media_type="application/json")


def _answer(model: Model, body: PoolingRequest, task: Task, values: Array, counts: list[int]) -> bytes:
    each: Any = values
    if task == "token_embed":
        each = [row[:count] for row, count in zip(values, counts, strict=True)]  # without the padding
    elif task == "classify":
        each = scores(values, model.pipeline.bundle.manifest.activation)
    elif body.dimensions is not None:
        each = cut(values, body.dimensions)
    data = [
        {"index": place, "object": "pooling", "data": written(one, body.encoding_format)}
        for place, one in enumerate(each)
    ]
    head = {"id": f"pool-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model.name}
    usage = {"prompt_tokens": sum(counts), "completion_tokens": 0, "total_tokens": sum(counts)}
    return as_json({**head, "data": data, "usage": usage})

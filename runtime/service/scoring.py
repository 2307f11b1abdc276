"""/rerank, /score and /classify: scores of texts, and of pairs of texts, by a classifier or by an embedding model.

Shapes: /rerank as Cohere's and Jina's clients read it, /score and /classify as vLLM's do.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.engines import Array
from stageline.runtime.scores import scores
from stageline.runtime.service.embeddings import check_count
from stageline.runtime.service.errors import ApiError, json_response
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import ClassifyRequest, RerankRequest, ScoreRequest
from starlette.responses import Response


async def rerank(model: Model, body: RerankRequest) -> Response:
    """Respond with the documents' places, the most relevant first."""
    documents = body.texts or [one if isinstance(one, str) else one.text for one in body.documents]
    relevance, tokens = await _relevance(model, [body.query] * len(documents), documents, "documents", body.limit)
    order = np.argsort(-relevance, kind="stable")[: body.top_n]
    if body.texts is not None:
        return json_response(
            [
                {"index": int(place), "score": float(relevance[place])}
                | ({"text": documents[place]} if body.return_text else {})
                for place in order
            ]
        )
    results = [
        {
            "index": int(place),
            "relevance_score": float(relevance[place]),
            **({"document": {"text": documents[place]}} if body.return_documents else {}),
        }
        for place in order
    ]
    answer = {"id": f"rerank-{uuid.uuid4().hex}", "model": model.name, "results": results, "usage": _usage(tokens)}
    return json_response(answer)


async def score(model: Model, body: ScoreRequest) -> Response:
    """Respond with a score for each pair of texts; a single first text goes with each of the others."""
    first, second = ([one] if isinstance(one, str) else one for one in (body.text_1, body.text_2))
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ApiError(400, f"{len(first)} texts go with {len(second)}; give one, or as many", param="text_1")
    relevance, tokens = await _relevance(model, first, second, "text_2", body.limit)
    data = [{"index": place, "object": "score", "score": one} for place, one in enumerate(relevance.tolist())]
    return json_response({**_head("score", model), "data": data, "usage": _usage(tokens)})


async def classify(model: Model, body: ClassifyRequest) -> Response:
    """Respond with each text's scores, and the name of the highest."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    truncate = body.truncate or body.truncate_prompt_tokens is not None
    values, tokens = await classifier_scores(model, texts, None, "input", truncate, body.limit)
    labels = labels_of(model)
    data = [
        {"index": place, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)}
        for place, row in enumerate(values)
    ]
    return json_response({**_head("classify", model), "data": data, "usage": _usage(tokens)})


def labels_of(model: Model) -> tuple[str, ...]:
    """The names of a classifier's labels."""
    (logits,) = (spec for spec in model.pipeline.signature.outputs if spec.name == "logits")
    return model.pipeline.bundle.manifest.labels or tuple(f"LABEL_{i}" for i in range(int(logits.shape[-1])))


async def _relevance(
    model: Model, first: Sequence[str], second: Sequence[str], param: str, limit: int | None
) -> tuple[np.ndarray[Any, Any], int]:
    """A score for each pair, float64 [pairs], and the tokens read: a reranker's, or the cosine of two embeddings."""
    if not model.classifies:
        check_count(second, param)
        vectors, tokens = await _run(model, [*dict.fromkeys(first), *second], None, EMBEDDING, True, limit)
        places = {text: place for place, text in enumerate(dict.fromkeys(first))}
        units = vectors.astype(np.float64)
        units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
        return (units[[places[text] for text in first]] * units[len(places) :]).sum(axis=1), tokens
    values, tokens = await classifier_scores(model, first, second, param, True, limit)
    if values.shape[1] != 1:
        labels = f"gives {values.shape[1]} scores for a text, a reranker gives one; send the request to /classify"
        raise ApiError(400, f"the model {model.name!r} {labels}", param="model")
    return values[:, 0], tokens


async def classifier_scores(
    model: Model,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    param: str,
    truncate: bool,
    limit: int | None = None,
) -> tuple[np.ndarray[Any, Any], int]:
    """A classifier's scores, float64 [texts, labels], and the tokens read."""
    check_count(texts, param)
    logits, tokens = await _run(model, texts, pairs, "logits", truncate, limit)
    return scores(logits, model.pipeline.bundle.manifest.activation), tokens


async def _run(
    model: Model,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    output: str,
    truncate: bool,
    limit: int | None,
) -> tuple[Array, int]:
    encoded = await asyncio.to_thread(model.encoder.encode, texts, pairs, truncate, limit=limit)
    given = {spec.name: encoded[spec.name] for spec in model.pipeline.signature.inputs}
    values = await asyncio.wrap_future(model.pipeline.submit(given, [output], wait=False))
    return values[output], int(encoded["attention_mask"].sum())


def _head(kind: str, model: Model) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model.name,
    }  # fmt: skip


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}

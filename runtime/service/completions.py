"""/v1/completions: continues prompts, given as texts or token ids."""

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stageline.runtime.service.errors import ApiError, json_response
from stageline.runtime.service.generations import Generations, usage
from stageline.runtime.service.logprobs import of_completion
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import CompletionRequest, each
from stageline.runtime.service.server_sent_events import EventStream
from starlette.responses import Response


async def complete(model: Model, body: CompletionRequest) -> Response:
    """Respond with whole texts, or start to stream them. Choice c of prompt p has the index p x n + c."""
    prompts = await asyncio.to_thread(_prompts, model, body)
    generations = await Generations.start(model, prompts, body.sampling, body.deadline_s)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return await EventStream.begin(_chunks(model, body, generations, head), model.pipeline)
    completions = await generations.completions()
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": None if body.logprobs is None else of_completion(model, choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choice for completion in completions for choice in completion.choices)
    ]
    return json_response({**head, "choices": choices, "usage": usage(completions)})


def _prompts(model: Model, body: CompletionRequest) -> list[list[int]]:
    given = each(body.prompt)
    if not given:
        raise ApiError(400, "prompt is an empty list; give a text", param="prompt")
    return [model.fitting(model.encoder.ids(one) if isinstance(one, str) else one) for one in given]


async def _chunks(
    model: Model, body: CompletionRequest, generations: Generations, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    if body.stream_options.include_usage:
        head = {**head, "usage": None}
    offsets: defaultdict[int, int] = defaultdict(int)
    async with aclosing(generations.pieces()) as pieces:
        async for prompt, piece in pieces:
            index = prompt * body.n + piece.choice
            logprobs = None if body.logprobs is None else of_completion(model, piece.logprobs, offsets[index])
            offsets[index] += sum(len(token.text) for token in piece.logprobs)
            if piece.text or logprobs or piece.finish_reason:
                reason = piece.finish_reason
                choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
                so_far = {"usage": generations.usage()} if body.stream_options.continuous_usage_stats else {}
                yield {**head, "choices": [choice], **so_far}
    if body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage(generations.finished())}

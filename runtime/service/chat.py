"""/v1/chat/completions: turns messages into a prompt, and the generated text into a message or chunks of one."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stageline.runtime.generation.request import Choice
from stageline.runtime.service.errors import json_response
from stageline.runtime.service.generations import Generations, usage
from stageline.runtime.service.logprobs import of_chat
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import ChatRequest
from stageline.runtime.service.server_sent_events import EventStream
from starlette.responses import Response


async def chat(model: Model, body: ChatRequest) -> Response:
    """Respond with a whole message, or start to stream it."""
    prompt = await asyncio.to_thread(_prompt, model, body)
    generations = await Generations.start(model, [prompt], body.sampling, body.deadline_s)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return await EventStream.begin(_chunks(model, body, generations, head), model.pipeline)
    (completion,) = await generations.completions()
    answer = {
        **head,
        "choices": [_choice(model, body, number, choice) for number, choice in enumerate(completion.choices)],
        "usage": usage([completion]),
    }
    return json_response(answer)


def _prompt(model: Model, body: ChatRequest) -> list[int]:
    messages = [message.for_template for message in body.messages]
    return model.fitting(model.pipeline.chat_ids(messages, **body.template_variables))


def _choice(model: Model, body: ChatRequest, number: int, choice: Choice) -> dict[str, Any]:
    return {
        "index": number,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": of_chat(model, choice.logprobs) if body.logprobs else None,
        "finish_reason": choice.finish_reason,
    }


async def _chunks(
    model: Model, body: ChatRequest, generations: Generations, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice its role, its text in pieces, and its finish reason; then the usage, if asked for."""
    if body.stream_options.include_usage:
        head = {**head, "usage": None}

    def chunk(number: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        so_far = {"usage": generations.usage()} if body.stream_options.continuous_usage_stats else {}
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **so_far}

    begun: set[int] = set()
    async with aclosing(generations.pieces()) as pieces:
        async for _, piece in pieces:
            if piece.choice not in begun:
                begun.add(piece.choice)
                yield chunk(piece.choice, {"role": "assistant", "content": "", "refusal": None})
            logprobs = of_chat(model, piece.logprobs) if body.logprobs else None
            if piece.text or logprobs:
                yield chunk(piece.choice, {"content": piece.text}, logprobs)
            if piece.finish_reason is not None:
                yield chunk(piece.choice, {}, finish=piece.finish_reason)
    if body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage(generations.finished())}

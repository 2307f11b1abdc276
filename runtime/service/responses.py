"""/v1/responses: OpenAI's newer way to chat, whole or as its named events. Nothing is stored."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stageline.models.errors import StagelineError
from stageline.runtime.generation.request import Completion, FinishReason
from stageline.runtime.service.answering import Answering
from stageline.runtime.service.chat import prepared
from stageline.runtime.service.errors import from_stageline, json_response
from stageline.runtime.service.generations import Generations
from stageline.runtime.service.logprobs import of_chat
from stageline.runtime.service.model import Model
from stageline.runtime.service.response_items import Items
from stageline.runtime.service.responses_schema import NamedFunction, ResponsesRequest
from stageline.runtime.service.server_sent_events import EventStream
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_TYPE = b'data: {"type":"'  # how events begin: see `_event`


async def respond(model: Model, body: ResponsesRequest) -> Response:
    """Respond with a whole response, or start to stream its events."""
    prompt, answering, sampling = await asyncio.to_thread(prepared, model, body.chat, body.sampling)
    generations = await Generations.start(model, [prompt], sampling, body.deadline_s)
    head = _head(model, body)
    if body.stream:
        return await NamedEvents.begin(_events(model, body, answering, generations, head), model.pipeline)
    (completion,) = await generations.completions()
    return json_response(await asyncio.to_thread(_whole, model, body, answering, completion, head))


class NamedEvents(EventStream):
    """An event stream in which each event also has its type as its name, and of which the last one is the end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole response."""

        async def named(message: Message) -> None:
            data = message.get("body", b"")
            if data.startswith(_TYPE):
                name = data[len(_TYPE) : data.index(b'"', len(_TYPE))]
                message = {**message, "body": b"event: " + name + b"\n" + data}
            if data != b"data: [DONE]\n\n":
                await send(message)

        await super().__call__(scope, receive, named)


def _whole(
    model: Model, body: ResponsesRequest, answering: Answering, completion: Completion, head: dict[str, Any]
) -> dict[str, Any]:
    choice = completion.choices[0]
    items = Items(answering, _status(choice.finish_reason))
    logprobs = of_chat(model, choice.logprobs)["content"] if body.wants_logprobs else []
    for _ in items.push(choice.text, logprobs, last=True):
        pass  # the events of a stream
    return _ended(head, items, completion)


async def _events(
    model: Model, body: ResponsesRequest, answering: Answering, generations: Generations, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """All events of one response, numbered, from the first token on. What fails later ends them."""
    count = 0

    def event(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        number, count = count, count + 1
        return {"type": found["type"], "sequence_number": number, **found}

    pieces = generations.pieces()
    async with aclosing(pieces):
        piece: Any = (await anext(pieces))[1]  # an error before it has a status of its own
        yield event({"type": "response.created", "response": head})
        yield event({"type": "response.in_progress", "response": head})
        items = Items(answering)
        try:
            while True:
                own = of_chat(model, piece.logprobs)["content"] if body.wants_logprobs else []
                if piece.finish_reason is not None:
                    items.status = _status(piece.finish_reason)
                for found in items.push(piece.text, own, last=piece.finish_reason is not None):
                    yield event(found)
                following = await anext(pieces, None)
                if following is None:
                    break
                piece = following[1]
            (completion,) = generations.finished()
        except StagelineError as error:
            message = from_stageline(error, model.pipeline.closed).body["error"]["message"]
            failed = {**head, "status": "failed", "error": {"code": "server_error", "message": message}}
            yield event({"type": "response.failed", "response": failed})
            return
    yield event({"type": f"response.{items.status}", "response": _ended(head, items, completion)})


def _head(model: Model, body: ResponsesRequest) -> dict[str, Any]:
    """A response of which nothing has come yet."""
    format_ = body.text.format.model_dump(by_alias=True, exclude_none=True)
    temperature = model.temperature if body.temperature is None else body.temperature
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedFunction) else body.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata,
        "model": model.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": temperature,
        "text": {"format": format_},
        "tool_choice": choice,
        "tools": [tool.model_dump() for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _ended(head: dict[str, Any], items: Items, completion: Completion) -> dict[str, Any]:
    """The response once all of it is there."""
    new = completion.completion_tokens
    usage = {
        "input_tokens": completion.prompt_tokens,
        "input_tokens_details": {"cached_tokens": completion.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": completion.prompt_tokens + new,
    }
    details = {"reason": "max_output_tokens"} if items.status == "incomplete" else None
    return {**head, "status": items.status, "incomplete_details": details, "output": items.done, "usage": usage}


def _status(reason: FinishReason) -> str:
    return "incomplete" if reason == "length" else "completed"

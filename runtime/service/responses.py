"""/v1/responses: OpenAI's newer way to chat, whole or as its named events. Nothing is stored."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stageline.models.errors import StagelineError
from stageline.runtime.generation.request import Completion, FinishReason
from stageline.runtime.service.errors import from_stageline, json_response
from stageline.runtime.service.generations import Generations
from stageline.runtime.service.logprobs import of_chat
from stageline.runtime.service.model import Model
from stageline.runtime.service.responses_schema import ResponsesRequest
from stageline.runtime.service.server_sent_events import EventStream
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_TYPE = b'data: {"type":"'  # how events begin: see `_Events.event`


async def respond(model: Model, body: ResponsesRequest) -> Response:
    """Respond with a whole response, or start to stream its events."""
    prompt = await asyncio.to_thread(_prompt, model, body)
    generations = await Generations.start(model, [prompt], body.sampling, body.deadline_s)
    head = _head(model, body)
    if body.stream:
        return await NamedEvents.begin(_Events(model, body, head).all(generations), model.pipeline)
    (completion,) = await generations.completions()
    choice = completion.choices[0]
    logprobs = of_chat(model, choice.logprobs)["content"] if body.wants_logprobs else []
    item = _item(f"msg_{uuid.uuid4().hex}", _status(choice.finish_reason), [_part(choice.text, logprobs)])
    return json_response(_ended(head, item, completion))


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


class _Events:
    """The events of one response, numbered."""

    def __init__(self, model: Model, body: ResponsesRequest, head: dict[str, Any]) -> None:
        self._model, self._body, self._head = model, body, head
        self._count = 0
        self._item_id = f"msg_{uuid.uuid4().hex}"

    async def all(self, generations: Generations) -> AsyncGenerator[dict[str, Any], None]:
        """From the first token on. What fails later ends them with response.failed."""
        pieces = generations.pieces()
        async with aclosing(pieces):
            piece: Any = (await anext(pieces))[1]  # an error before it has a status of its own
            yield self._event("response.created", response=self._head)
            yield self._event("response.in_progress", response=self._head)
            yield self._event(
                "response.output_item.added", output_index=0, item=_item(self._item_id, "in_progress", [])
            )
            yield self._part_event("response.content_part.added", part=_part("", []))
            texts: list[str] = []
            logprobs: list[dict[str, Any]] = []
            try:
                while True:
                    own = of_chat(self._model, piece.logprobs)["content"] if self._body.wants_logprobs else []
                    texts.append(piece.text)
                    logprobs += own
                    if piece.text or own:
                        yield self._part_event("response.output_text.delta", delta=piece.text, logprobs=own)
                    found = await anext(pieces, None)
                    if found is None:
                        break
                    piece = found[1]
                (completion,) = generations.finished()
            except StagelineError as error:
                yield self._event("response.failed", response=self._failed(error))
                return
        text, status = "".join(texts), _status(completion.choices[0].finish_reason)
        part = _part(text, logprobs)
        item = _item(self._item_id, status, [part])
        yield self._part_event("response.output_text.done", text=text, logprobs=logprobs)
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{status}", response=_ended(self._head, item, completion))

    def _event(self, type_: str, **more: Any) -> dict[str, Any]:
        number, self._count = self._count, self._count + 1
        return {"type": type_, "sequence_number": number, **more}

    def _part_event(self, type_: str, **more: Any) -> dict[str, Any]:
        return self._event(type_, item_id=self._item_id, output_index=0, content_index=0, **more)

    def _failed(self, error: StagelineError) -> dict[str, Any]:
        message = from_stageline(error, self._model.pipeline.closed).body["error"]["message"]
        return {**self._head, "status": "failed", "error": {"code": "server_error", "message": message}}


def _prompt(model: Model, body: ResponsesRequest) -> list[int]:
    return model.fitting(model.pipeline.chat_ids(body.messages))


def _head(model: Model, body: ResponsesRequest) -> dict[str, Any]:
    """A response of which nothing has come yet."""
    format_ = body.text.format.model_dump(by_alias=True, exclude_none=True)
    temperature = model.temperature if body.temperature is None else body.temperature
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
        "tool_choice": body.tool_choice,
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _ended(head: dict[str, Any], item: dict[str, Any], completion: Completion) -> dict[str, Any]:
    """The response once all of it is there."""
    status, new = item["status"], completion.completion_tokens
    usage = {
        "input_tokens": completion.prompt_tokens,
        "input_tokens_details": {"cached_tokens": completion.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": completion.prompt_tokens + new,
    }
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {**head, "status": status, "incomplete_details": details, "output": [item], "usage": usage}


def _status(reason: FinishReason) -> str:
    return "incomplete" if reason == "length" else "completed"


def _item(id_: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": id_, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

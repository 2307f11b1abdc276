"""/v1/chat/completions: turns messages into a prompt, and the generated text into a message or chunks of one."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from stageline.runtime.generation.answer import AnswerReader, Part
from stageline.runtime.generation.request import Choice, Completion
from stageline.runtime.service.answering import Answering
from stageline.runtime.service.errors import json_response
from stageline.runtime.service.generations import Generations, usage
from stageline.runtime.service.logprobs import by_token, of_chat
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import ChatRequest
from stageline.runtime.service.server_sent_events import EventStream
from stageline.runtime.service.tools import call_id
from starlette.responses import Response


async def chat(model: Model, body: ChatRequest) -> Response:
    """Respond with a whole message, or start to stream it."""
    prompt, answering, sampling = await asyncio.to_thread(prepared, model, body, body.sampling)
    generations = await Generations.start(model, [prompt], sampling, body.deadline_s)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return await EventStream.begin(_chunks(model, body, answering, generations, head), model.pipeline)
    (completion,) = await generations.completions()
    answer: dict[str, Any] = {
        **head,
        "choices": await asyncio.to_thread(_choices, model, body, answering, completion),
        "usage": usage([completion]),
    }
    if body.prompt_logprobs is not None:
        of_prompt = await asyncio.to_thread(by_token, model, completion.prompt_logprobs, body.prompt_logprobs)
        answer["prompt_logprobs"] = of_prompt
    return json_response(answer)


def prepared(model: Model, body: ChatRequest, sampling: dict[str, Any]) -> tuple[list[int], Answering, dict[str, Any]]:
    """The prompt of a chat, how its answer is read, and the keywords for `Sampling`, `sampling` among them.

    RequestError for a template that cannot do what is asked.
    """
    # First, since a template without tools would leave them out in silence.
    form = model.tool_format if body.offered else None
    messages = [message.for_template for message in body.messages]
    prompt = model.fitting(model.pipeline.chat_ids(messages, **body.template_variables))
    answering = Answering.of(model, body, form, prompt, sampling["structure"])
    return prompt, answering, {**sampling, **answering.sampling}


def _choices(model: Model, body: ChatRequest, answering: Answering, completion: Completion) -> list[dict[str, Any]]:
    """Beside the event loop: to take long texts apart takes its time."""
    return [_choice(model, body, answering, number, choice) for number, choice in enumerate(completion.choices)]


def _choice(model: Model, body: ChatRequest, answering: Answering, number: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish: str = choice.finish_reason
    if not answering.plain:
        reader = answering.reader()
        parts = [*reader.push(choice.text), *reader.finish()]
        message |= _message(parts, answering)
        finish = _finish(reader, choice.finish_reason)
    return {
        "index": number,
        "message": message,
        "logprobs": of_chat(model, choice.logprobs) if body.logprobs else None,
        "finish_reason": finish,
    }


def _message(parts: Sequence[Part], answering: Answering) -> dict[str, Any]:
    """The parts of a message, in OpenAI's form; `reasoning_content` is DeepSeek's and vLLM's."""

    def text(kind: str) -> str:
        return "".join(part.text for part in parts if part.kind == kind)

    calls = [
        {
            "id": _call_id(answering),
            "type": "function",
            "function": {
                "name": part.text,
                "arguments": "".join(one.text for one in parts if (one.kind, one.call) == ("arguments", part.call)),
            },
        }
        for part in parts
        if part.kind == "name"
    ]
    message: dict[str, Any] = {"content": text("content") or (None if calls else "")}
    if answering.reasons is not None:
        message["reasoning_content"] = text("reasoning") or None
    return {**message, "tool_calls": calls} if calls else message


def _delta(part: Part, answering: Answering) -> dict[str, Any]:
    """A part in a chunk."""
    match part.kind:
        case "content":
            return {"content": part.text}
        case "reasoning":
            return {"reasoning_content": part.text}
        case "name":
            named = {"id": _call_id(answering), "type": "function"}
            return {"tool_calls": [{"index": part.call, **named, "function": {"name": part.text, "arguments": ""}}]}
        case "arguments":
            return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}


def _call_id(answering: Answering) -> str:
    return call_id(answering.form is not None and answering.form.short_ids)


def _finish(reader: AnswerReader | None, reason: str) -> str:
    """Calls that are whole end an answer as tool_calls."""
    return "tool_calls" if reader is not None and reader.calls and reason == "stop" else reason


async def _chunks(
    model: Model, body: ChatRequest, answering: Answering, generations: Generations, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice its role, its text in pieces, and its finish reason; then the usage, if asked for."""
    if body.stream_options.include_usage:
        head = {**head, "usage": None}

    def chunk(number: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        so_far = {"usage": generations.usage()} if body.stream_options.continuous_usage_stats else {}
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **so_far}

    readers: dict[int, AnswerReader | None] = {}
    async with aclosing(generations.pieces()) as pieces:
        async for _, piece in pieces:
            if piece.choice not in readers:
                readers[piece.choice] = None if answering.plain else answering.reader()
                yield chunk(piece.choice, {"role": "assistant", "content": "", "refusal": None})
            reader = readers[piece.choice]
            deltas = [{"content": piece.text}] if piece.text else []
            if reader is not None:
                parts = reader.push(piece.text) + (reader.finish() if piece.finish_reason else [])
                deltas = [_delta(part, answering) for part in parts]
            logprobs = of_chat(model, piece.logprobs) if body.logprobs else None
            if logprobs and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield chunk(piece.choice, delta, logprobs)
                logprobs = None
            if piece.finish_reason is not None:
                yield chunk(piece.choice, {}, finish=_finish(reader, piece.finish_reason))
    if body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage(generations.finished())}

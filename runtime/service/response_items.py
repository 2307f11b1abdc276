"""The items of a response as they are written: reasoning, messages and calls, and the events that tell of them."""

import uuid
from collections.abc import Iterator
from typing import Any

from stageline.runtime.generation.answer import Part
from stageline.runtime.service.answering import Answering
from stageline.runtime.service.tools import call_id

_Event = dict[str, Any]
_CONTENT = {"content": ("output_text", "msg"), "reasoning": ("reasoning_text", "rs")}


class Items:
    """Takes an answer's text in pieces and gives the events of its items, which are `done` one after the other. There
    is a message if there is nothing else."""

    def __init__(self, answering: Answering, status: str = "completed") -> None:
        """`status`: of the last item, once it is known."""
        self.done: list[dict[str, Any]] = []
        self.status = status
        self._answering = answering
        self._reader = None if answering.plain else answering.reader()
        self._open: tuple[str, int] | None = None  # the kind of the item that is being written, and which call
        self._item: dict[str, Any] = {}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def push(self, text: str, logprobs: list[dict[str, Any]], last: bool) -> Iterator[_Event]:
        """The events of more text, with its tokens' log probabilities; `last`: no text follows."""
        if self._reader is None:
            parts = [Part("content", text)]
        else:
            parts = self._reader.push(text) + (self._reader.finish() if last else [])
            said_without_text = logprobs and self._open == ("content", 0)
            nothing_at_all = last and self._open is None and not self.done
            if not parts and (said_without_text or nothing_at_all):
                parts = [Part("content", "")]
        for part in parts:
            yield from self._take(part, logprobs)
            logprobs = []
        if last:
            yield from self._close(self.status)

    def _take(self, part: Part, logprobs: list[dict[str, Any]]) -> Iterator[_Event]:
        kind = part.kind if part.kind in _CONTENT else "call"
        if self._open != (kind, part.call):
            yield from self._close("completed")
            yield from self._begin(part, kind)
        if part.kind == "name" or not (part.text or logprobs):
            return
        self._texts.append(part.text)
        if part.kind == "arguments":
            yield self._about("response.function_call_arguments.delta", delta=part.text)
            return
        more = {}
        if part.kind == "content":
            self._logprobs += logprobs
            more = {"logprobs": logprobs}
        type_ = _CONTENT[part.kind][0]
        yield self._about(f"response.{type_}.delta", content_index=0, delta=part.text, **more)

    def _begin(self, part: Part, kind: str) -> Iterator[_Event]:
        self._open = kind, part.call
        self._texts, self._logprobs = [], []
        form = self._answering.form
        if kind == "call":
            named = {"call_id": call_id(form is not None and form.short_ids), "name": part.text}
            self._item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", **named, "arguments": ""}
        else:
            id_ = f"{_CONTENT[kind][1]}_{uuid.uuid4().hex}"
            message = {"type": "message", "role": "assistant"} if kind == "content" else {"type": "reasoning"}
            self._item = {"id": id_, **message, **({} if kind == "content" else {"summary": []}), "content": []}
        item = {**self._item, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": item}
        if kind != "call":
            yield self._about("response.content_part.added", content_index=0, part=self._part(kind))

    def _close(self, status: str) -> Iterator[_Event]:
        if self._open is None:
            return
        kind, _ = self._open
        text = "".join(self._texts)
        if kind == "call":
            item = {**self._item, "arguments": text, "status": status}
            yield self._about("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = self._part(kind)
            item = {**self._item, "content": [part], "status": status}
            more = {"logprobs": self._logprobs} if kind == "content" else {}
            yield self._about(f"response.{_CONTENT[kind][0]}.done", content_index=0, text=text, **more)
            yield self._about("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.done), "item": item}
        self.done.append(item)
        self._open = None

    def _part(self, kind: str) -> dict[str, Any]:
        """The part of the open item, with what is written of it."""
        part = {"type": _CONTENT[kind][0], "text": "".join(self._texts)}
        return {**part, "annotations": [], "logprobs": self._logprobs} if kind == "content" else part

    def _about(self, type_: str, **more: Any) -> _Event:
        return {"type": type_, "item_id": self._item["id"], "output_index": len(self.done), **more}

"""Server-sent events: a response sent in pieces."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from time import monotonic
from typing import Any, Self

from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.errors import as_json, from_stageline
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PING_S = 15.0
_PING: ContextVar[float] = ContextVar("ping_s", default=PING_S)


class PingMiddleware:
    """Sets after how many idle seconds streams send a comment, so that proxies do not take them for dead."""

    def __init__(self, app: ASGIApp, ping_s: float) -> None:
        self._app, self._ping_s = app, ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        token = _PING.set(self._ping_s)
        try:
            await self._app(scope, receive, send)
        finally:
            _PING.reset(token)


class EventStream(Response):
    """Sends each chunk as `data: JSON`, then `data: [DONE]`. If a chunk fails, it sends an error instead of the rest.

    It owns the chunks and closes them when the response ends, whatever ends it. It takes the next chunk only when the
    client has room for it. Where no chunk comes for a while, it sends comments.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        first: "asyncio.Task[dict[str, Any]]",
        pipeline: Pipeline,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._chunks, self._first, self._pipeline = chunks, first, pipeline

    @classmethod
    async def begin(cls, chunks: AsyncGenerator[dict[str, Any], None], pipeline: Pipeline) -> Self:
        """Wait for the first chunk, at most until a comment is due. An error before it can still be a response with its
        own status."""
        first: asyncio.Task[dict[str, Any]] = asyncio.ensure_future(anext(chunks))
        try:
            await asyncio.wait([first], timeout=_PING.get())
        except BaseException:
            await _end(first)
            raise
        if first.done():
            first.result()
        return cls(chunks, first, pipeline)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole response."""
        ping_s, sent_at = _PING.get(), math.inf

        async def noted(message: Message) -> None:
            nonlocal sent_at
            sent_at = math.inf  # while the client takes it
            await send(message)
            sent_at = monotonic()

        async def ping() -> None:
            wait_s = ping_s
            while True:
                await asyncio.sleep(wait_s)
                if monotonic() - sent_at >= ping_s:
                    await noted(_event(b": ping"))
                wait_s = ping_s - max(0.0, monotonic() - sent_at)

        pinging = asyncio.create_task(ping())
        async with aclosing(self._chunks):
            try:
                await noted({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await noted(_data(as_json(await self._first)))
                async for chunk in self._chunks:
                    await noted(_data(as_json(chunk)))
            except StagelineError as error:
                last = as_json(from_stageline(error, self._pipeline.closed).body)
            else:
                last = b"[DONE]"
            finally:
                await _end(pinging)
                await _end(self._first)
            await send(_data(last))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # is not news any more


def _data(data: bytes) -> dict[str, Any]:
    return _event(b"data: " + data)


def _event(line: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": line + b"\n\n", "more_body": True}

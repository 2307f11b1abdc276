"""Server-sent events: a response sent in pieces."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Self

from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.errors import as_json, from_stageline
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """Sends each chunk as `data: JSON`, then `data: [DONE]`. If a chunk fails, it sends an error instead of the rest.

    It owns the chunks and closes them when the response ends, whatever ends it. It takes the next chunk only when the
    client has room for it.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], first: dict[str, Any], pipeline: Pipeline) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._chunks, self._first, self._pipeline = chunks, first, pipeline

    @classmethod
    async def begin(cls, chunks: AsyncGenerator[dict[str, Any], None], pipeline: Pipeline) -> Self:
        """Wait for the first chunk. An error before it can still be a response with its own status."""
        return cls(chunks, await anext(chunks), pipeline)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole response."""
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send(_event(as_json(self._first)))
            try:
                async for chunk in self._chunks:
                    await send(_event(as_json(chunk)))
            except StagelineError as error:
                await send(_event(as_json(from_stageline(error, self._pipeline.closed).body)))
            else:
                await send(_event(b"[DONE]"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}

"""The id of each request, taken from the client or made, given back to it, and a line in the log for each response."""

import json
import logging
import time
import uuid
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("stageline.requests")
_LONGEST = 128


class RequestIdMiddleware:
    """Gives each response the header X-Request-ID, and logs it to `stageline.requests` at level INFO."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        number = _id(Headers(scope=scope).get("x-request-id"))
        began, status = time.perf_counter(), 499  # the client disconnected first

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            facts = {
                "request_id": number,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
            }
            LOG.info(
                "%(method)s %(path)r %(status)d in %(seconds).3f s, id %(request_id)s", facts, extra={"facts": facts}
            )


def _id(given: str | None) -> str:
    """The client's own, if it may stand in a header and in a log."""
    if given and len(given) <= _LONGEST and all("!" <= letter <= "~" for letter in given):
        return given
    return uuid.uuid4().hex


class JsonLines(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, logger and message, or the facts of a request instead of the message."""
        said = getattr(record, "facts", None) or {"message": record.getMessage()}
        when = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, **said}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(form: Literal["text", "json"]) -> None:
    """Write requests, and what else Stageline and its server report, to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("stageline: %(message)s"))
    LOG.setLevel(logging.INFO)
    for name in ("stageline", "uvicorn"):
        logging.getLogger(name).addHandler(handler)

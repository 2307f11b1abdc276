"""ASGI middleware that limits requests: the API key, requests at a time, size of a body, stalled clients."""

import asyncio
import hmac
from collections.abc import Sequence
from contextlib import suppress

from stageline.runtime.service.errors import ApiError, busy
from stageline.runtime.service.schema import UNKNOWN_DROPPED
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_TO_ALL = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
STALL_S = 300.0  # a client that neither sends nor reads anything for this long is cut off
_DISCARD_S = 10.0
_WARNING = 1000  # characters of a header


class _StalledError(Exception):
    """The client does not read."""


class AccessMiddleware:
    """Passes on at most `concurrency` requests at a time, and only with an API key if there are some. Health and
    metrics are open to all."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], concurrency: int) -> None:
        self._app, self._concurrency = app, concurrency
        self._keys = [f"Bearer {key}".encode() for key in api_keys]
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 401 or 429, or pass the request on."""
        if scope["type"] != "http" or route_of(scope) in OPEN_TO_ALL:
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        right = [hmac.compare_digest(given, key) for key in self._keys]  # all of them: none shall be known by its time
        if self._keys and not any(right):
            message = "send the service's API key, as Authorization: Bearer KEY"
            return await refuse(ApiError(401, message, code="invalid_api_key"), scope, receive, send)
        if self._inside >= self._concurrency:
            return await refuse(
                busy(f"{self._inside} requests are being answered; try again in a moment"), scope, receive, send
            )
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


class ConnectionMiddleware:
    """Reads a request's body of at most `max_body_bytes`, and cancels the task that answers it if the client
    disconnects."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with 413, 415 or 408, or pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            body = await self._body(scope, receive)
        except ApiError as error:
            return await refuse(error, scope, receive, send)
        if body is not None:
            await self._answer(scope, body, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected before its end."""
        too_large = ApiError(
            413,
            f"the body has more than {self._max_body_bytes} bytes; send a smaller one",
            headers={"Connection": "close"},
        )
        headers = Headers(scope=scope)
        encoding, declared = headers.get("content-encoding", "identity"), headers.get("content-length", "0")
        if encoding.lower() != "identity":
            said = f"a body in {encoding[:40]!r} is not unpacked; send the body as it is, without Content-Encoding"
            raise ApiError(415, said)
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise too_large
        body, more = bytearray(), True
        while more:
            try:
                async with asyncio.timeout(STALL_S):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"no more of the body arrived for {STALL_S:.0f} s", headers={"Connection": "close"}
                ) from None
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise too_large
        return bytes(body)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        unread, answered = [body], False

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.wait([gone])
            return {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            try:
                async with asyncio.timeout(STALL_S):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        answer = asyncio.ensure_future(self._app(scope, replay, watched))
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
            if answered:  # then `gone` does not matter
                await asyncio.wait([answer])
        finally:
            gone.cancel()
            answer.cancel()
            await asyncio.wait([answer, gone])
        if not answer.cancelled():
            with suppress(_StalledError):  # the server closes the connection: the response is not whole
                answer.result()


class UnknownMiddleware:
    """Lets requests have unknown parameters, which are left out and named in the response's header Warning."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        names: list[str] = []

        async def warned(message: Message) -> None:
            if message["type"] == "http.response.start" and names:
                listed = "".join(c if " " <= c <= "~" and c not in '"\\' else "?" for c in ", ".join(names))
                warning = f'299 stageline "ignored: {listed[:_WARNING]}"'
                message = {**message, "headers": [*message["headers"], (b"warning", warning.encode())]}
            await send(message)

        token = UNKNOWN_DROPPED.set(names)
        try:
            await self._app(scope, receive, warned)
        finally:
            UNKNOWN_DROPPED.reset(token)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error without using the request's body. Many clients read a response only once they have sent everything,
    so the body is read and dropped first, for some seconds, unless the client waits to be asked for it."""
    if Headers(scope=scope).get("expect", "").lower() != "100-continue":
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
    await error.response(scope, receive, send)


def route_of(scope: Scope) -> str:
    """The path, relative to where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

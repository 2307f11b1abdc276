"""Bodies of requests, weighed before they are parsed.

The JSON parser and pydantic keep Python's lock from the first byte to the last, in whatever thread they run: 4 MB of
small lists would stop all streams for seconds. So a body is refused that holds more values than a request has, and a
large one is read beside the event loop, in steps between which the lock is given away.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from stageline.runtime.service.errors import ApiError
from starlette.requests import Request
from starlette.responses import Response

MOST_VALUES = 500_000
"""Of which each list, each object and each of its names counts as _DEAR."""
_AT_ONCE = 64 * 1024  # bytes: under a millisecond
_DEAR = 10  # they take as much longer than a number
_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class WeighingRoute(APIRoute):
    """A route that refuses bodies of too many values."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The handler, for such requests."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            response: Response = await handle(_Weighed(request.scope, request.receive))
            return response

        return handler


class _Weighed(Request):
    async def json(self) -> Any:
        """The body's value. ValueError for what is no JSON, ApiError for too many values."""
        body = await self.body()
        return _value(body) if len(body) < _AT_ONCE else await asyncio.to_thread(_value, body)


def _value(body: bytes) -> Any:
    text = body.decode(json.detect_encoding(body), "surrogatepass")  # as json.loads does
    if _weight(text, 0, len(text)) > MOST_VALUES:  # texts included, which weigh nothing
        _weigh(text)
    return json.loads(text)


def _weight(text: str, begin: int, end: int) -> int:
    dear = sum(text.count(mark, begin, end) for mark in ("[", "{", ":"))
    return text.count(",", begin, end) + _DEAR * dear


def _weigh(text: str) -> None:
    """ApiError for too many values outside of texts."""
    weight = place = 0
    for found in _TEXT.finditer(text):
        weight += _weight(text, place, found.start())
        place = found.end()
        if weight > MOST_VALUES:
            break
    if weight + _weight(text, place, len(text)) > MOST_VALUES:
        raise ApiError(
            400, f"the body holds more than {MOST_VALUES} values, a list or a name counted as {_DEAR}; send fewer"
        )

"""Errors as an HTTP status and the JSON that OpenAI's clients read.

RequestError      400 invalid_request_error       DeadlineError     504 timeout
unknown model     404 model_not_found             EngineError       500 server_error
QueueFullError    429 queue_full, Retry-After     pipeline closed   503 shutting_down
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from stageline.models.errors import (
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestError,
    StagelineError,
    StructureError,
)
from starlette.exceptions import HTTPException
from starlette.responses import Response

RETRY_AFTER_S = 1


class ApiError(HTTPException):
    """An error response. `param` names the parameter at fault; programs read `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> Response:
        """The whole HTTP response."""
        return Response(as_json(self.body), self.status_code, self.headers, "application/json")


def as_json(data: Any) -> bytes:
    """JSON in ASCII: a text may quote half a surrogate pair that a client sent, which UTF-8 cannot hold."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def json_response(data: Any, status: int = 200) -> Response:
    """`data` as the response of a route."""
    return Response(as_json(data), status, media_type="application/json")


def from_stageline(error: StagelineError, closed: bool) -> ApiError:
    """The response to a runtime error. `closed`: a pipeline was closed, which fails its unfinished requests."""
    message = str(error)
    if isinstance(error, QueueFullError):
        return busy("the queue is full; try again in a moment")
    if isinstance(error, DeadlineError):
        return ApiError(504, message, "timeout_error", code="timeout")
    if isinstance(error, RequestError) and closed:
        return ApiError(503, "the service is shutting down", "server_error", code="shutting_down")
    if isinstance(error, (RequestError, StructureError)):
        return ApiError(400, message)
    return ApiError(500, message, "server_error", code="engine_error" if isinstance(error, EngineError) else None)


def busy(message: str) -> ApiError:
    """The response to one request too many at a time."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers=headers)


def first_message(error: ValidationError) -> str:
    """What is wrong first, in one line."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return f"{'.'.join(map(str, first['loc']))}: {message}" if first["loc"] else message


def from_validation(error: RequestValidationError, known: Sequence[str]) -> ApiError:
    """The response to a body's first error. `known`: the parameters of its endpoint."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    path = [str(part) for part in first["loc"][1:] if not str(part).startswith("<")]  # which kind of an item it is
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}, at byte {first['loc'][1]}")
    message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if first["type"] in ("dict_type", "model_attributes_type", "missing") and not path:
        return ApiError(400, "the body is not a JSON object; send one, with content-type application/json")
    if not path:
        return ApiError(400, message)
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        place = f"; known: {', '.join(known)}" if len(path) == 1 else ""
        return ApiError(400, f"unknown or unsupported parameter {name!r}{place}", param=path[0])
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=path[0])
    return ApiError(400, f"{name}: {message}", param=path[0])

"""A served endpoint that speaks OpenAI's HTTP API, measured by the same client: Stageline's own, or any peer's.

Completions are streamed, which times the first token and those after it. If the endpoint sends no usage, each chunk
with text counts as a token. Each thread keeps its own connection open.
"""

import json
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import pairwise
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from stageline.models.errors import RequestError
from stageline.runtime.bench.contenders import FailedRequestError, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.pipeline import Pipeline

CONNECTIONS = 256
"""Requests in progress at a time; the time that more of them wait counts as latency."""
_TIMEOUT_S = 300.0
_MOST_BYTES = 256 * 2**20  # of an answer: 2,048 vectors of 4,096 numbers are below
_LINE_BYTES = 2**20  # of a stream; and what is read of an error
_LINES_PER_TOKEN, _LINES = 8, 1000  # of a stream before it is taken for endless


class Endpoint:
    """The model `model` (None: the first listed) at `url`, the part before /v1. A `Contender`."""

    pipeline: Pipeline | None = None

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        """RequestError if nothing answers there, or not as OpenAI's API does."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"{url!r} is not the URL of an endpoint; give one like http://127.0.0.1:8000")
        self.name = url.rstrip("/").removesuffix("/v1")
        self._secure, self._host, self._path = (
            parts.scheme == "https",
            parts.netloc,
            parts.path.rstrip("/").removesuffix("/v1"),
        )
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._local = threading.local()
        self._open: set[HTTPConnection] = set()
        self._exact, self._closed = True, False
        names = [str(entry.get("id")) for entry in self._json("GET", "/v1/models").get("data", ())]
        if not names or (model is not None and model not in names):
            raise RequestError(f"{self.name} serves {', '.join(names) or 'no model'}; choose one of them")
        self.model = model or names[0]
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="endpoint")

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """See `Contender`."""
        return self._pool.submit(self._ask, item)

    def close(self) -> None:
        """Break off requests in progress and wait for their threads."""
        self._closed = True
        for connection in list(self._open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, item: Item) -> RequestOutcome:
        given: Any = list(item.texts) or [list(row) for row in item.rows]
        if item.output_tokens is None:
            self._json("POST", "/v1/embeddings", {"model": self.model, "input": given})
            return RequestOutcome(perf_counter())
        body = {
            "model": self.model,
            "prompt": given[0],
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._exact:
            try:
                return self._streamed({**body, "min_tokens": item.output_tokens})
            except RequestError as error:
                if "min_tokens" not in str(error):
                    raise
                self._exact = False  # OpenAI's own API has no such parameter: a text may end early there
        return self._streamed(body)

    def _streamed(self, body: dict[str, Any]) -> RequestOutcome:
        response = self._send("POST", "/v1/completions", body)
        times: list[float] = []
        tokens, done, lines = 0, False, 0
        try:
            while line := response.readline(_LINE_BYTES):
                lines += 1
                if len(line) == _LINE_BYTES or lines > _LINES + _LINES_PER_TOKEN * body["max_tokens"]:
                    raise ValueError("more than was asked for")
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    done = True
                    break
                chunk = json.loads(data)
                if "error" in chunk:
                    raise FailedRequestError(
                        "error in mid stream", f"{self.name} failed in mid stream: {_error_message(chunk)}"
                    )
                tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
                if chunk.get("choices") and chunk["choices"][0].get("text"):
                    times.append(perf_counter())
            if len(response.read(_LINE_BYTES)) == _LINE_BYTES:
                self._drop()
        except (OSError, HTTPException, ValueError) as error:
            self._drop()
            raise FailedRequestError(_kind(error), f"{self.name} broke off in mid stream ({error})") from error
        if not done:
            self._drop()
            raise FailedRequestError(
                "disconnected", f"{self.name} broke off in mid stream: its stream ended without [DONE]"
            )
        ended = perf_counter()
        gaps = tuple(after - before for before, after in pairwise(times))
        return RequestOutcome(ended, tokens or len(times), times[0] if times else ended, gaps)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            data = self._send(method, path, body).read(_MOST_BYTES)
            if len(data) == _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES >> 20} MB")
            answer = json.loads(data)
        except (OSError, HTTPException, ValueError) as error:
            self._drop()
            raise FailedRequestError(_kind(error), f"{self.name}{path} did not answer in JSON ({error})") from error
        if not isinstance(answer, dict):
            raise RequestError(f"{self.name}{path} does not answer as OpenAI's API does")
        return answer

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        """The response, its body unread. RequestError if its status is not 200."""
        data = None if body is None else json.dumps(body).encode()
        response = None
        for fresh in (False, True):  # the server may have closed a connection that was kept open
            connection = self._connection(fresh)
            try:
                connection.request(method, self._path + path, data, self._headers)
                response = connection.getresponse()
                break
            except TimeoutError as error:  # it may be at work on it: not sent again
                self._drop()
                raise FailedRequestError("timeout", f"{self.name}{path} gave no answer in {_TIMEOUT_S:g} s") from error
            except (OSError, HTTPException) as error:
                self._drop()
                if fresh or self._closed:
                    raise FailedRequestError(
                        _kind(error), f"{self.name} cannot be reached ({error}); is it running?"
                    ) from error
        assert response is not None
        if response.status != 200:
            text = response.read(_LINE_BYTES)
            if len(text) == _LINE_BYTES:
                self._drop()  # the rest is not waited for
            try:
                message = _error_message(json.loads(text))
            except ValueError:
                message = text[:200].decode(errors="replace")
            raise FailedRequestError(
                f"status {response.status}", f"{self.name}{path} answers {response.status}: {message}"
            )
        return response

    def _connection(self, fresh: bool) -> HTTPConnection:
        found: HTTPConnection | None = getattr(self._local, "connection", None)
        if found is None or fresh:
            kind = HTTPSConnection if self._secure else HTTPConnection
            found = self._local.connection = kind(self._host, timeout=_TIMEOUT_S)
            self._open.add(found)
        return found

    def _drop(self) -> None:
        found: HTTPConnection | None = getattr(self._local, "connection", None)
        if found is not None:
            found.close()
            self._open.discard(found)
            self._local.connection = None


def _kind(error: Exception) -> str:
    """What kind of failure an exception of a connection is."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return "invalid answer" if isinstance(error, ValueError) else "disconnected"


def _error_message(answer: Any) -> str:
    """The message in an error answer of OpenAI's API."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or answer)[:200]

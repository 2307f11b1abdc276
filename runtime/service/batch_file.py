"""OpenAI's batch files: lines of requests in, lines of responses out, through the same app that answers over HTTP.

in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
out  {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A line that is no request has no response, and an `error` of a code and a message; one that the app refuses has the
app's own response. Lines come out in the order in which they end.
"""

import asyncio
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from fastapi import FastAPI
from stageline.models.errors import RequestError
from stageline.runtime.bundle.folder import removed_on_failure

_AGAIN_S = 0.05  # until a request for which there was no place is sent again


@dataclass(frozen=True)
class BatchSummary:
    """How many requests there were, and how many of them were answered with status 200."""

    requests: int
    answered: int
    prompt_tokens: int
    completion_tokens: int


class _LineError(Exception):
    """A line that is no request."""


async def run_batch(
    app: FastAPI,
    source: Path,
    target: Path,
    concurrency: int,
    progress: Callable[[int, int, int], None] = lambda ended, failed, total: None,
) -> BatchSummary:
    """Answer the requests of a file, at most `concurrency` at a time, and write the other file, aside and then renamed.

    `progress` gets how many have ended, how many of these failed, and how many there are. RequestError for a file
    without requests; OSError where one cannot be read or written.
    """
    with source.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    if not total:
        raise RequestError(f"{source} has no requests; write one a line")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with removed_on_failure([aside]), source.open("rb") as lines:
        with aside.open("w", encoding="utf-8") as written:
            batch = _Batch(app, written, total, progress)
            await batch.run(lines, concurrency)
        aside.replace(target)
    return BatchSummary(total, batch.answered, batch.prompt_tokens, batch.completion_tokens)


class _Batch:
    """A file's requests, of which some are under way."""

    def __init__(self, app: FastAPI, written: IO[str], total: int, progress: Callable[[int, int, int], None]) -> None:
        self.answered = self.prompt_tokens = self.completion_tokens = 0
        self._ended, self._total, self._progress, self._written = 0, total, progress, written
        routes = [route for route in app.routes if "POST" in (getattr(route, "methods", None) or ())]
        self._urls = sorted({str(getattr(route, "path", "")) for route in routes})
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._seen: set[str] = set()

    async def run(self, lines: IO[bytes], concurrency: int) -> None:
        """Answer all, so many at a time."""
        async with httpx.AsyncClient(transport=self._transport, base_url="http://localhost", timeout=None) as client:
            running: set[asyncio.Task[None]] = set()
            try:
                for line in lines:
                    if not line.strip():
                        continue
                    if len(running) >= concurrency:
                        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                        for task in ended:
                            task.result()
                    running.add(asyncio.create_task(self._answer(client, line)))
                await asyncio.gather(*running)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, client: httpx.AsyncClient, line: bytes) -> None:
        number, response, error = f"batch_req_{uuid.uuid4().hex}", None, None
        custom_id = None
        try:
            request = _object(line)
            given = request.get("custom_id")
            custom_id = given if isinstance(given, str) else None
            url, body = self._checked(request, custom_id)
            content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            while (answer := await client.post(url, content=content, headers=headers)).status_code == 429:
                await asyncio.sleep(_AGAIN_S)
            told = answer.json()
            response = {
                "status_code": answer.status_code,
                "request_id": answer.headers["x-request-id"],
                "body": told,
            }
            self._count(answer.status_code, told)
        except _LineError as wrong:
            error = {"code": "invalid_request", "message": str(wrong)}
        self._written.write(
            json.dumps({"id": number, "custom_id": custom_id, "response": response, "error": error}) + "\n"
        )
        self._ended += 1
        self._progress(self._ended, self._ended - self.answered, self._total)

    def _checked(self, request: dict[str, Any], custom_id: str | None) -> tuple[str, dict[str, Any]]:
        """The URL and the body."""
        if custom_id is None:
            raise _LineError("custom_id is missing, or no text")
        if custom_id in self._seen:
            raise _LineError(f"custom_id {custom_id!r} was there before; give each request its own")
        self._seen.add(custom_id)
        method, url, body = request.get("method", "POST"), request.get("url"), request.get("body")
        if method != "POST" or url not in self._urls:
            raise _LineError(f"{method} {url} cannot be asked in a batch; POST to one of {', '.join(self._urls)}")
        if not isinstance(body, dict):
            raise _LineError("body is missing, or no JSON object")
        if body.get("stream"):
            raise _LineError("stream has no place in a batch; leave it out")
        return str(url), body

    def _count(self, status: int, told: Any) -> None:
        if status == 200:
            self.answered += 1
            used = told.get("usage") or {}
            self.prompt_tokens += used.get("prompt_tokens") or used.get("input_tokens") or 0
            self.completion_tokens += used.get("completion_tokens") or used.get("output_tokens") or 0


def _object(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _LineError(f"the line is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise _LineError("the line is not a JSON object")
    return request

"""The middleware alone, with clients of every kind: what a server would hand it, step by step."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from stageline.runtime.service import limits
from stageline.runtime.service.limits import ConnectionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(await Request(scope, receive).body())(scope, receive, send)


def receiving(*messages: Message) -> Callable[[], Awaitable[Message]]:
    """These, and then nothing for ever."""
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


def part(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def exchange(app: Any, *messages: Message, send: Any = None) -> list[Message]:
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    asyncio.run(ConnectionMiddleware(app, 1000)(SCOPE, receiving(*messages), send or keep))
    return sent


def test_a_body_comes_whole_however_it_was_cut() -> None:
    start, end = exchange(echo, part(b"ab", True), part(b"", True), part(b"cd", False))
    assert start["status"] == 200
    assert end["body"] == b"abcd"


def test_a_body_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert exchange(echo, part(b"x" * 600, True), part(b"x" * 400, False))[0]["status"] == 200
    assert exchange(echo, part(b"x" * 600, True), part(b"x" * 401, False))[0]["status"] == 413


def test_a_client_that_goes_before_the_end_of_its_body_gets_nothing() -> None:
    assert exchange(echo, part(b"ab", True), {"type": "http.disconnect"}) == []


def test_a_client_that_goes_cancels_the_work() -> None:
    ended = []

    async def works(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    assert exchange(works, part(b"", False), {"type": "http.disconnect"}) == []
    assert ended == [True]


def test_what_the_work_raises_is_raised() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exchange(fails, part(b"", False))


def test_a_body_that_stalls_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.05)
    monkeypatch.setattr(limits, "_DISCARD_S", 0.05)
    assert exchange(echo, part(b"ab", True))[0]["status"] == 408


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.05)
    tried = []

    async def stalls(message: Message) -> None:
        tried.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    exchange(echo, part(b"ab", False), send=stalls)
    assert tried == ["http.response.start", "http.response.body"]

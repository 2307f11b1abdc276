"""Who may not use a service: other sites' pages, clients without a key, connections that only hold on."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from fastapi import FastAPI
from fastapi.routing import APIRoute
from stageline.runtime.service import connections, server
from stageline.runtime.service.app import create_app
from stageline.runtime.service.connections import ConnectionWatch
from stageline.runtime.service.limits import OPEN_TO_ALL
from stageline.runtime.service.request_log import LOG, JsonLines

Serve = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Iterator[Any]:
    hosts, origins = ["models.example", "*.internal"], ["https://app.example"]
    with serve(api_key=["sesame", "open"], allowed_hosts=hosts, cors_origins=origins) as service:
        service.client.headers["authorization"] = "Bearer sesame"
        yield service


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("192.168.1.7:8000", 200),
     ("models.example", 200), ("a.internal:1", 200), ("internal", 421), ("evil.example", 421), ("xinternal", 421),
     ("localhost.evil.example", 421), ("", 421), ("[::1", 421), ("localhost@evil.example", 421)],
)  # fmt: skip
def test_only_known_names_are_answered(guarded: Any, host: str, status: int) -> None:
    answer = guarded.client.get("/v1/models", headers={"host": host})
    assert answer.status_code == status
    if status == 421:
        assert answer.json()["error"]["code"] == "unknown_host"
        assert guarded.client.get("/health", headers={"host": host}).status_code == 200  # of probes


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://app.example", 200), ("http://localhost:3000", 200), ("http://127.0.0.1:8000", 200),
     ("https://evil.example", 403), ("null", 403), ("https://app.example.evil", 403), ("http://[", 403)],
)  # fmt: skip
def test_only_known_pages_are_answered(guarded: Any, origin: str, status: int) -> None:
    answer = guarded.client.get("/v1/models", headers={"origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://app.example" else None)


def test_a_browser_may_ask_before_it_sends(guarded: Any) -> None:
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    del guarded.client.headers["authorization"]
    try:
        answer = guarded.client.options("/v1/chat/completions", headers=headers)
    finally:
        guarded.client.headers["authorization"] = "Bearer sesame"
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_every_route_but_health_and_metrics_asks_for_a_key(guarded: Any) -> None:
    app = create_app(guarded.pipelines, api_key=["sesame", "open"])

    async def statuses(path: str, method: str) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            keys = (None, "", "sesam", "sesame ", "open")
            headers = [{} if key is None else {"authorization": f"Bearer {key}"} for key in keys]
            return [(await client.request(method, path, headers=given)).status_code for given in headers]

    asked = 0
    for route in [*app.routes]:
        path = str(getattr(route, "path", ""))
        for method in getattr(route, "methods", None) or ():
            found = asyncio.run(statuses(path.replace("{name:path}", "llama"), method))
            if path in OPEN_TO_ALL:
                assert 401 not in found
            else:
                assert found[:4] == [401] * 4, path
                assert found[4] != 401, path
                asked += isinstance(route, APIRoute)
    assert asked >= 14


def head(service: Any, lines: bytes) -> bytes:
    """What comes back for these bytes."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
        try:
            connection.sendall(lines)
            return connection.recv(1000)
        except (ConnectionResetError, BrokenPipeError):
            return b""


@pytest.mark.parametrize(
    "lines",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**20,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200_000,
        b"GET /" + b"x" * 2**20,
        b"\x00" * 1000 + b"\r\n\r\n",
    ],
    ids=["header of 1 MB", "200,000 headers", "URL of 1 MB", "zeros"],
)
def test_a_head_is_bounded(guarded: Any, lines: bytes) -> None:
    answer = head(guarded, lines + b"\r\n\r\n")
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert guarded.client.get("/health").status_code == 200


def test_a_body_of_many_tiny_chunks_is_read_and_bounded(serve: Serve) -> None:
    with serve(max_body_bytes=50_000) as service:
        chunks = (b" " for _ in range(60_000))
        answer = service.client.post("/v1/completions", content=chunks, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert service.post("completions", model="llama", prompt="a", max_tokens=1).status_code == 200


def test_silent_connections_are_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    with serve() as service, ExitStack() as stack:
        address = urlsplit(service.url)
        held = [
            stack.enter_context(socket.create_connection((address.hostname or "", address.port or 0), timeout=10))
            for _ in range(60)
        ]
        for place, connection in enumerate(held):
            if place % 2:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        began = time.monotonic()
        assert {connection.recv(1000) for connection in held} == {b""}
        assert time.monotonic() - began < 5
        service.faults.step = lambda stage, inputs, outputs: time.sleep(0.02)  # what is being answered stays
        body = {"model": "llama", "prompt": "a cat", "min_tokens": 60, "max_tokens": 60, "temperature": 0}
        assert service.post("completions", **body).status_code == 200


def test_who_is_silent_before_tls_is_closed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.5)
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    listening, ready = server.bound_socket("127.0.0.1", 0), threading.Event()
    address = listening.getsockname()
    running = server.DrainingServer(FastAPI(), [], 0, ready.set, tmp_path / "pem")
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
        assert ready.wait(20)
        with ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(20)]
            for place, connection in enumerate(held):
                if place % 2:
                    connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
            began = time.monotonic()
            assert {connection.recv(1000) for connection in held} == {b""}
            assert time.monotonic() - began < 8
    finally:
        running.should_exit = True
        thread.join(20)


class Fake:
    """A connection as uvicorn keeps it."""

    def __init__(self, answers: bool = False) -> None:
        self.cycle = type("Cycle", (), {"response_complete": not answers})()
        self.transport, self.closed = self, False

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def test_of_too_many_connections_the_longest_silent_go_first() -> None:
    first, busy, second = Fake(), Fake(answers=True), Fake()
    held: set[Any] = {first, busy}
    watch = ConnectionWatch(held)
    watch.look(0.0)
    held.add(second)
    watch.make_room(1.0)
    assert [one.closed for one in (first, busy, second)] == [True, False, False]
    watch.make_room(2.0)
    assert [one.closed for one in (busy, second)] == [False, True]
    third = Fake()
    held.add(third)
    watch.look(3.0)
    watch.look(connections.HEAD_S + 2.9)
    assert not third.closed
    watch.look(connections.HEAD_S + 3.1)
    assert [one.closed for one in (busy, third)] == [False, True]


def test_a_request_keeps_its_id(guarded: Any) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert guarded.client.get(path, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = guarded.client.get("/health").headers["x-request-id"]
    assert len(made) == 32
    for wrong in ("x" * 200, "a b", "a\u00e9".encode("latin-1")):
        assert len(guarded.client.get("/health", headers={"x-request-id": wrong}).headers["x-request-id"]) == 32


def test_each_response_is_a_line_of_json(guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=LOG.name):
        guarded.client.get("/v1/models?key=secret", headers={"x-request-id": "abc-2"})
        guarded.client.get("/x%0Ay", headers={"x-request-id": "abc-3"})
        deadline = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [JsonLines().format(record) for record in caplog.records if record.name == LOG.name]
    assert all("\n" not in line and "secret" not in line for line in lines)
    said = {line["request_id"]: line for line in map(json.loads, lines)}
    assert (said["abc-2"]["path"], said["abc-2"]["status"], said["abc-2"]["method"]) == ("/v1/models", 200, "GET")
    assert said["abc-2"]["seconds"] > 0
    assert all("\n" not in record.getMessage() for record in caplog.records)

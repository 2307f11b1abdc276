"""How the ways in which an endpoint fails are told apart, on a server that fails as asked."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
from stageline.runtime.bench import endpoint as module
from stageline.runtime.bench.client import Client
from stageline.runtime.bench.contenders import FailedRequestError
from stageline.runtime.bench.endpoint import Endpoint
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import FAILED

ITEM = Item(("a cat",), ((1, 2),), {}, 4)
Way = Callable[[BaseHTTPRequestHandler, Event], object]


def status(number: int) -> Way:
    def answer(handler: BaseHTTPRequestHandler, over: Event) -> None:
        data = json.dumps({"error": {"message": f"no: {number}"}}).encode()
        handler.send_response(number)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def stream(*lines: str) -> Way:
    def answer(handler: BaseHTTPRequestHandler, over: Event) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write("".join(f"data: {line}\n\n" for line in lines).encode())
        handler.close_connection = True

    return answer


def endless(begin: str, block: str, number: int = 200) -> Way:
    """Sends until nobody takes it any more, at most 1 GB."""

    def answer(handler: BaseHTTPRequestHandler, over: Event) -> None:
        handler.send_response(number)
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            handler.wfile.write(begin.encode())
            for _ in range(2**30 // len(block)):
                handler.wfile.write(block.encode())

    return answer


def hang_up(handler: BaseHTTPRequestHandler, over: Event) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silence(handler: BaseHTTPRequestHandler, over: Event) -> None:
    over.wait(20)


@pytest.fixture
def failing() -> Iterator[Callable[[Way], tuple[str, list[str]]]]:
    """Starts a server whose POSTs end in that way; gives its URL and the paths that were posted to so far."""
    over = Event()
    started: list[tuple[ThreadingHTTPServer, Thread]] = []

    def start(way: Way) -> tuple[str, list[str]]:
        posted: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                models = json.dumps({"data": [{"id": "m"}]}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(models)))
                self.end_headers()
                self.wfile.write(models)

            def do_POST(self) -> None:
                posted.append(self.path)
                self.rfile.read(int(self.headers["content-length"]))
                way(self, over)

            def log_message(self, *arguments: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}", posted

    yield start
    over.set()
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        (status(401), "status 401", "answers 401: no: 401"),
        (status(429), "status 429", "answers 429: no: 429"),
        (status(500), "status 500", "answers 500: no: 500"),
        (hang_up, "disconnected", "cannot be reached"),
        (stream('{"choices": [{"text": "a"}]}'), "disconnected", "its stream ended without [DONE]"),
        (stream("no JSON"), "invalid answer", "broke off in mid stream"),
        (stream('{"error": {"message": "full"}}'), "error in mid stream", "failed in mid stream: full"),
    ],
)
def test_each_way_to_fail_has_its_kind(
    way: Way, kind: str, message: str, failing: Callable[[Way], tuple[str, list[str]]]
) -> None:
    url, _ = failing(way)
    endpoint = Endpoint(url)
    found = Client(endpoint, [ITEM], Event()).open_loop([0.0] * 3)
    endpoint.close()
    assert set(found.requests.status) == {FAILED}
    (failures,) = found.failures
    assert (failures.kind, failures.count) == (kind, 3)
    assert message in failures.sample


TOKEN = 'data: {"choices": [{"text": "a"}]}\n\n'


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        (endless(TOKEN, TOKEN), "invalid answer", "more than was asked for"),
        (endless("data: ", "x" * 2**16), "invalid answer", "more than was asked for"),
        (endless("", "x" * 2**16, 500), "status 500", "answers 500: xxx"),
        (endless("", "HTTP/1.1 302\r\n\r\n", 302), "status 302", "answers 302"),
    ],
    ids=["tokens", "a line", "an error", "a redirect"],
)
def test_an_endless_answer_is_broken_off(
    way: Way, kind: str, message: str, failing: Callable[[Way], tuple[str, list[str]]]
) -> None:
    url, _ = failing(way)
    endpoint = Endpoint(url)
    with pytest.raises(FailedRequestError) as caught:
        endpoint.submit(ITEM).result(20)
    endpoint.close()
    assert caught.value.kind == kind
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_comes_after_the_end_of_a_stream_is_left(failing: Callable[[Way], tuple[str, list[str]]]) -> None:
    url, _ = failing(endless(f"{TOKEN}data: [DONE]\n\n", "x" * 2**16))
    endpoint = Endpoint(url)
    assert [endpoint.submit(ITEM).result(20).tokens_out for _ in range(2)] == [1, 1]
    endpoint.close()


def test_an_endless_answer_in_json_is_broken_off(
    failing: Callable[[Way], tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 10 * 2**20)
    url, _ = failing(endless('{"data": [', "1," * 2**15))
    endpoint = Endpoint(url)
    with pytest.raises(FailedRequestError, match="it has more than 10 MB"):
        endpoint.submit(replace(ITEM, output_tokens=None)).result(20)
    endpoint.close()


def test_a_request_that_times_out_is_not_sent_again(
    failing: Callable[[Way], tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.3)
    url, posted = failing(silence)
    endpoint = Endpoint(url)
    with pytest.raises(FailedRequestError) as caught:
        endpoint.submit(ITEM).result(10)
    endpoint.close()
    assert caught.value.kind == "timeout"
    assert posted == ["/v1/completions"]

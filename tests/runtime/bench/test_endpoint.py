"""How the ways in which an endpoint fails are told apart, on a server that fails as asked."""

import json
import socket
from collections.abc import Callable, Iterator
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

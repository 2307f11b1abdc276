"""What the benchmark's client says of the served endpoint, against another load generator and the service itself."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from stageline.models.errors import RequestError
from stageline.runtime.bench.client import Client
from stageline.runtime.bench.endpoint import Endpoint
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED

Serve = Callable[..., AbstractContextManager[Any]]

NEW = 6
PROMPT = "a cat sat on a dog"
ITEM = Item((PROMPT,), ((1, 2, 3, 4, 5, 6),), {}, NEW)


async def plain_load(url: str, arrivals_s: Sequence[float] | None, seconds: float) -> tuple[float, float]:
    """Requests a second and their median latency: at these times, or one after the other for so long."""
    latencies: list[float] = []
    body = {"model": "llama", "prompt": PROMPT, "max_tokens": NEW, "min_tokens": NEW, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(timeout=30) as client:
        began = time.monotonic()

        async def ask(due: float) -> None:
            await asyncio.sleep(began + due - time.monotonic())
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        break
            latencies.append(time.monotonic() - began - due)

        if arrivals_s is not None:
            await asyncio.gather(*map(ask, arrivals_s))
        while arrivals_s is None and time.monotonic() - began < seconds:
            await ask(time.monotonic() - began)
        return len(latencies) / (time.monotonic() - began), statistics.median(latencies)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("arrivals_s", [None, [0.3 * number for number in range(5)]], ids=["closed", "open"])
def test_an_independent_load_generator_agrees_within_5_percent(serve: Serve, arrivals_s: list[float] | None) -> None:
    """One request at a time: several fall into step with each other in ways that differ from time to time."""
    with serve(slots=4) as running:
        running.faults.step = lambda stage, inputs, outputs: time.sleep(0.020)  # so that the stages set the pace
        endpoint = Endpoint(running.url, "llama")
        client = Client(endpoint, [ITEM], Event())
        client.closed_loop(1, 0.3)
        ours, theirs = [], []
        for _ in range(3):  # in turn, since a busy machine drifts
            counted = running.metric("stageline_generation_tokens_total")
            answers = client.closed_loop(1, 1.2) if arrivals_s is None else client.open_loop(arrivals_s)
            drawn = running.metric("stageline_generation_tokens_total") - counted
            assert int(answers.requests.tokens_out.sum()) == drawn == NEW * len(answers.requests)
            latencies = answers.requests.latency_s.tolist()
            ours.append((len(latencies) / answers.seconds, statistics.median(latencies)))
            theirs.append(asyncio.run(plain_load(running.url, arrivals_s, 1.2)))
        endpoint.close()
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert statistics.median(mine) == pytest.approx(statistics.median(other), rel=0.05)


def test_the_times_of_a_stream_are_those_of_its_tokens(serve: Serve) -> None:
    with serve() as running:
        running.faults.step = lambda stage, inputs, outputs: time.sleep(0.010)
        endpoint = Endpoint(running.url)
        assert endpoint.model == "llama"
        outcome = endpoint.submit(Item((PROMPT,), ((1,),), {}, NEW)).result(20)
        endpoint.close()
    assert outcome.tokens_out == NEW
    assert len(outcome.gaps_s) == NEW - 1
    assert outcome.first_token_at is not None
    assert outcome.done_at - outcome.first_token_at >= sum(outcome.gaps_s)
    assert min(outcome.gaps_s) > 0.005


def test_embeddings_are_measured(serve: Serve) -> None:
    with serve() as running:
        endpoint = Endpoint(f"{running.url}/v1", "bert")
        client = Client(endpoint, [Item(("a cat", "a dog"), ((1, 2), (1, 3)), {}, None)], Event())
        answers = client.open_loop([0.0] * 20)
        endpoint.close()
    assert (answers.requests.status == ANSWERED).all()


def test_what_is_no_endpoint_is_reported(serve: Serve) -> None:
    with serve() as running:
        refusals: dict[tuple[Any, ...], str] = {
            ("ftp://somewhere",): "is not the URL of an endpoint",
            (running.url, "gpt"): "serves llama, bert; choose one of them",
            (f"{running.url}/nowhere",): "answers 404",
        }
        for given, message in refusals.items():
            with pytest.raises(RequestError, match=message):
                Endpoint(*given)
    with pytest.raises(RequestError, match=r"cannot be reached .*is it running"):
        Endpoint(running.url)


def test_an_endpoint_that_stops_in_mid_run_ends_the_drive_with_its_reason(serve: Serve) -> None:
    with serve(drain_s=0) as running:
        endpoint = Endpoint(running.url, "llama")
        client = Client(endpoint, [Item((PROMPT,), ((1,),), {}, NEW)], Event())
        assert client.closed_loop(1, 0.2).requests.status.sum() == 0
        running.server.should_exit = True
        with pytest.raises(RequestError, match=r"cannot be reached|broke off in mid stream|answers 503|mid stream"):
            client.closed_loop(2, 20)
        endpoint.close()


def test_closing_breaks_off_what_an_endpoint_never_answers() -> None:
    models = json.dumps({"data": [{"id": "m"}]}).encode()

    class Silent(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(models)))
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self) -> None:
            asked.set()
            gone.wait(20)

        def log_message(self, *arguments: Any) -> None: ...

    asked, gone = Event(), Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}")
        future = endpoint.submit(ITEM)
        assert asked.wait(10)
        endpoint.close()
        with pytest.raises(RequestError, match="cannot be reached"):
            future.result(0)
    finally:
        gone.set()
        server.shutdown()
        thread.join()
        server.server_close()

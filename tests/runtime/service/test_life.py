"""Clients that leave or dawdle, limits on how many are let in, and the end of the service."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from stageline.runtime.service.app import create_app

LONG = {"model": "llama", "prompt": "a cat", "min_tokens": 200, "max_tokens": 200}
RUNNING = 'stageline_num_requests_running{model="llama"}'


def slow(stage: int, inputs: Any, outputs: Any) -> None:
    time.sleep(0.01)


def eventually(condition: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def test_who_leaves_a_stream_frees_its_slot(serve: Any) -> None:
    with serve(slots=1) as service:
        service.faults.step = slow
        with service.stream("completions", **LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert service.metric(RUNNING) == 1
        eventually(lambda: service.metric(RUNNING) == 0, within_s=1)  # of about 4 that all 200 tokens take
        assert service.metric('stageline_requests_total{model="llama",outcome="cancelled"}') == 1
        assert service.post("completions", model="llama", prompt="a").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_answer_frees_its_slot_or_its_place(serve: Any, stream: bool) -> None:
    """One runs, the other waits for the one slot: both go."""
    with serve(slots=1) as service:
        service.faults.step = slow

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=service.url) as client:
                asked = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(2)]
                await asyncio.sleep(0.3)
                assert await asyncio.to_thread(service.metric, RUNNING) == 1
                assert await asyncio.to_thread(service.metric, 'stageline_num_requests_waiting{model="llama"}') == 1
                for task in asked:
                    task.cancel()

        asyncio.run(leave())
        cancelled = 'stageline_requests_total{model="llama",outcome="cancelled"}'
        eventually(lambda: service.metric(RUNNING) == 0 and service.metric(cancelled) == 2, within_s=1)
        assert service.metric('stageline_http_requests_total{route="/v1/completions",status="499"}') == 2


def test_who_reads_slowly_holds_nobody_up_and_misses_nothing(serve: Any) -> None:
    with serve(slots=1) as service:
        address = urlsplit(service.url)
        body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
        with socket.socket() as slow_reader:
            slow_reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow_reader.connect((address.hostname, address.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
            slow_reader.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            # It reads nothing, and its one slot is free again all the same.
            done = 'stageline_requests_total{model="llama",outcome="done"}'
            eventually(lambda: service.metric(done) == 1)
            assert service.post("completions", model="llama", prompt="a").status_code == 200
            received = b"".join(iter(lambda: slow_reader.recv(65536), b""))
        assert received.count(b'"object":"text_completion"') == 200
        assert b"data: [DONE]" in received


def test_more_than_the_queue_holds_is_429_and_comes_later(serve: Any) -> None:
    with serve(slots=2, queue=2) as service:
        service.faults.step = slow
        with service.stream("completions", **LONG), service.stream("completions", **LONG):  # until their first tokens
            answer = service.post("completions", model="llama", prompt="a")
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
            assert service.client.get("/health/ready").status_code == 200
        service.faults.step = lambda stage, inputs, outputs: None
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:  # tries again by itself
            assert client.completions.create(model="llama", prompt="a").choices


def test_several_prompts_wait_for_places_in_the_queue(serve: Any) -> None:
    with serve(queue=2) as service:
        prompts = ["a", "cat", "dog", "sat", "ran", "mats"]
        answer = service.post("completions", model="llama", prompt=prompts, temperature=0, max_tokens=5)
        assert [choice["text"] for choice in answer.json()["choices"]] == [
            service.pipelines["llama"].generate(prompt, max_tokens=5).result().text for prompt in prompts
        ]


def test_more_than_are_let_in_at_a_time_is_429(serve: Any) -> None:
    with serve(concurrency=1) as service:
        service.faults.step = slow
        with service.stream("completions", **LONG) as one:
            lines = one.iter_lines()
            next(lines)
            assert service.post("embeddings", model="bert", input="a").status_code == 429
            assert service.client.get("/health").status_code == 200
        eventually(lambda: service.post("embeddings", model="bert", input="a").status_code == 200)


def test_an_api_key_is_asked_for_where_there_is_one(serve: Any) -> None:
    with serve(api_key="sesame") as service:
        for key in ("wrong", "sesam\u00e9"):
            headers = {"authorization": f"Bearer {key}".encode("latin-1")}
            answer = service.client.post("/v1/completions", json={"model": "llama", "prompt": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert service.client.get("/v1/models").status_code == 401
        assert service.client.get("/health").status_code == 200
        assert service.client.get("/metrics").status_code == 200
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="sesame") as client:
            assert client.completions.create(model="llama", prompt="a").choices
        with (
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="guess") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_the_size_of_a_body_is_a_choice(serve: Any) -> None:
    with serve(max_body_bytes=1000) as service:
        assert service.post("embeddings", model="bert", input=["a"] * 100).status_code == 200
        assert service.post("embeddings", model="bert", input=["a"] * 300).status_code == 413


def streamed(service: Any) -> list[str]:
    """The lines of a long stream, during which the service is asked to stop."""
    with service.stream("completions", **LONG) as answer:
        lines = answer.iter_lines()
        begun = next(lines)
        service.server.should_exit = True
        return [begun, *filter(None, lines)]


def test_shutdown_lets_what_runs_finish_and_takes_no_more(serve: Any) -> None:
    with serve(drain_s=20) as service:
        service.faults.step = slow
        refused: list[bool] = []

        def come_late() -> None:
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{service.url}/health")
            refused.append(True)

        late = threading.Thread(target=come_late)
        late.start()
        lines = streamed(service)
        late.join()
        assert refused == [True]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_shutdown_tells_those_it_cuts_off(serve: Any) -> None:
    with serve(drain_s=0.3) as service:
        service.faults.step = lambda stage, inputs, outputs: time.sleep(0.05)
        error = json.loads(streamed(service)[-1].removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down"
        assert service.pipelines["llama"].closed


def test_an_idle_stream_sends_comments(serve: Any) -> None:
    """Also before its first token, when an error would have no status of its own any more."""
    with serve(slots=1, ping_s=0.2) as service:
        service.faults.step = lambda stage, inputs, outputs: time.sleep(0.35)
        with service.stream("completions", model="llama", prompt="a", max_tokens=2, min_tokens=2, logprobs=0) as answer:
            assert answer.status_code == 200
            lines = list(filter(None, answer.iter_lines()))
        chunks = [place for place, line in enumerate(lines) if line.startswith("data: {")]
        assert len(chunks) == 2
        assert lines[-1] == "data: [DONE]"
        assert {line for line in lines if not line.startswith("data: ")} == {": ping"}
        before, between = chunks[0], chunks[1] - chunks[0] - 1
        assert 2 <= before <= 4
        assert 2 <= between <= 4  # 0.7 s a token, of two stages

        def fail(stage: int, inputs: Any, outputs: Any) -> None:
            time.sleep(0.7)
            raise ZeroDivisionError

        service.faults.step = fail
        with service.stream("completions", model="llama", prompt="a cat") as answer:
            assert answer.status_code == 200
            lines = list(filter(None, answer.iter_lines()))
        assert lines[0] == ": ping"
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_error"


def test_the_app_can_be_mounted_in_another(serve: Any) -> None:
    with serve() as service:
        outer = FastAPI()
        outer.mount("/llm", create_app(service.pipelines, api_key="sesame"))

        async def ask() -> list[int]:
            transport = httpx.ASGITransport(outer)
            async with httpx.AsyncClient(transport=transport, base_url="http://outer") as client:
                body, headers = {"model": "llama", "prompt": "a"}, {"authorization": "Bearer sesame"}
                return [
                    (await client.get("/llm/health")).status_code,
                    (await client.post("/llm/v1/completions", json=body)).status_code,
                    (await client.post("/llm/v1/completions", json=body, headers=headers)).status_code,
                    (await client.get("/health")).status_code,
                ]

        assert asyncio.run(ask()) == [200, 401, 200, 404]


def test_a_model_may_be_called_as_it_is_on_the_hub(serve: Any) -> None:
    with serve() as service:
        app = create_app({"org/llama": service.pipelines["llama"]})

        async def ask(path: str) -> Any:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
                return (await client.get(path)).json()["id"]

        # openai's client quotes a name, a browser does not
        assert {asyncio.run(ask(f"/v1/models/{name}")) for name in ("org/llama", "org%2Fllama")} == {"org/llama"}


def test_a_closed_pipeline_is_not_ready(serve: Any) -> None:
    with serve() as service:
        service.pipelines["llama"].close()
        assert service.client.get("/health/ready").status_code == 503
        assert service.client.get("/health/live").status_code == 200
        answer = service.post("completions", model="llama", prompt="a")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"

"""Batch files: the same bodies mean the same as over HTTP, and a wrong line harms no other."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from stageline.models.errors import RequestError
from stageline.runtime.service.app import create_app
from stageline.runtime.service.batch_file import run_batch

Serve = Callable[..., AbstractContextManager[Any]]
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "a cat"}], "temperature": 0, "max_tokens": 4}
BODIES = {
    "chat": ("/v1/chat/completions", CHAT),
    "text": ("/v1/completions", {"model": "llama", "prompt": ["a cat", "a dog"], "temperature": 0, "max_tokens": 3}),
    "vector": ("/v1/embeddings", {"model": "bert", "input": ["a cat", "a dog"]}),
    "ranks": ("/v1/rerank", {"model": "bert", "query": "a cat", "documents": ["a dog", "a cat"]}),
    "unknown model": ("/v1/embeddings", {"model": "gpt", "input": "a"}),
    "unknown name": ("/v1/completions", {"model": "llama", "prompt": "a", "temprature": 1}),
    "not a number": ("/v1/completions", {"model": "llama", "prompt": "a", "temperature": float("nan")}),
    "surrogate": ("/v1/completions", {"model": "llama", "prompt": "a \ud800", "max_tokens": 1, "temperature": 0}),
}
VARYING = ("id", "created")


def line(custom_id: Any, url: Any, body: Any, **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def written(target: Path) -> dict[str | None, Any]:
    return {one["custom_id"]: one for one in map(json.loads, target.read_text().splitlines())}


def test_bodies_mean_what_they_mean_over_http(serve: Serve, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(line(name, *asked) for name, asked in BODIES.items()))
    with serve() as service:
        app = create_app(service.pipelines)
        done = asyncio.run(run_batch(app, source, target, 3))
        found = written(target)
        assert found.keys() == BODIES.keys()
        used = 0
        for name, (url, body) in BODIES.items():
            content = json.dumps(body)
            over_http = service.client.post(url, content=content, headers={"content-type": "application/json"})
            response = found[name]["response"]
            assert found[name]["error"] is None
            assert response["status_code"] == over_http.status_code, name
            for answer in (told := over_http.json(), response["body"]):
                for key in VARYING:
                    answer.pop(key, None)
            assert response["body"] == told
            if over_http.status_code == 200:
                used += told["usage"]["prompt_tokens"]
    assert (done.requests, done.answered) == (len(BODIES), 4)
    assert done.prompt_tokens == used
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_a_wrong_line_is_an_error_of_that_line(serve: Serve, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wrong = {
        "twice": "was there before",
        "get": "GET /v1/completions cannot be asked in a batch",
        "away": "POST http://other/v1/completions cannot be asked",
        "health": "POST /health cannot",
        "list": "body is missing",
        "stream": "stream has no place",
    }
    url, body = BODIES["text"]
    lines = [
        line("good", url, body), line("twice", url, body), line("twice", url, body), "{", "[]", "[" * 100_000, "\xff",
        line(None, url, body), line(7, url, body), line("get", url, body, method="GET"),
        line("away", f"http://other{url}", body), line("health", "/health", body), line("list", url, []),
        line("stream", url, {**body, "stream": True}), line("last", url, body),
    ]  # fmt: skip
    source.write_bytes("\n".join(lines).encode("latin-1"))
    told: list[tuple[int, int, int]] = []
    with serve() as service:
        app = create_app(service.pipelines)
        done = asyncio.run(run_batch(app, source, target, 1, progress=lambda *numbers: told.append(numbers)))
    assert (done.requests, done.answered) == (15, 3)
    assert told[-1] == (15, 12, 15)
    answers = [json.loads(one) for one in target.read_text().splitlines()]
    assert [one["custom_id"] for one in answers if one["response"]] == ["good", "twice", "last"]
    errors = [(one["custom_id"], one["error"]["message"]) for one in answers if one["error"]]
    assert len(errors) == 12
    for name, message in errors:
        assert "\n" not in message
        if name is not None:
            assert wrong[name] in message


def test_more_than_the_queue_holds_comes_in_turn_and_so_many_at_a_time(serve: Serve, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "llama", "prompt": "a cat", "max_tokens": 3, "temperature": 0}
    source.write_text("".join(line(str(n), "/v1/completions", body) + "\n" for n in range(40)))
    most = 0
    with serve(queue=3, slots=2) as service:

        def note(stage: int, inputs: Any, outputs: Any) -> None:
            nonlocal most
            stats = service.pipelines["llama"].stats().generation
            most = max(most, stats.running + stats.waiting)
            time.sleep(0.001)

        service.faults.step = note
        done = asyncio.run(run_batch(create_app(service.pipelines), source, target, 8))
    assert done.answered == 40
    assert 2 <= most <= 3
    assert len({one["response"]["body"]["choices"][0]["text"] for one in written(target).values()}) == 1


def test_nothing_is_written_where_it_cannot_be_finished(serve: Serve, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    target.write_text("before")
    source.write_text("\n")
    with serve() as service:
        app = create_app(service.pipelines)
        with pytest.raises(RequestError, match="has no requests; write one a line"):
            asyncio.run(run_batch(app, source, target, 1))
        with pytest.raises(FileNotFoundError):
            asyncio.run(run_batch(app, tmp_path / "none", target, 1))
        source.write_text("\n".join(line(str(n), *BODIES["text"]) for n in range(9)))

        def stop(ended: int, failed: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            asyncio.run(run_batch(app, source, target, 4, progress=stop))
    assert target.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == [source, target]

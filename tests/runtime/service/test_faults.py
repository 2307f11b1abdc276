"""Faults that have brought others down, where no other file has them: descriptors, broken threads, hostile bodies."""

import asyncio
import contextlib
import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

Serve = Callable[..., AbstractContextManager[Any]]
MAIN = "from stageline.exporter.commands.cli import main; raise SystemExit(main())"
BODY = {"model": "llama", "prompt": "a cat", "max_tokens": 5, "temperature": 0}
SLOW = """
import time
from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine as E
step = E.step
E.step = lambda *args: time.sleep(0.05) or step(*args)
"""
OPENING = """
import time
from stageline.runtime.pipeline import Pipeline
Pipeline.open = lambda *args: (print("opening", flush=True), time.sleep(60))
"""
BREAK = """
from stageline.runtime.generation.generator import Generator
def broken(self, flight):
    raise MemoryError("no more of it")
Generator._drawn = broken
"""


@contextmanager
def process(bundle: Path, code: str = "", files: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`stageline serve`, after some code, with at most so many files; and its address."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-c", code + MAIN, "serve", str(bundle), "--port", "0", "--name", "llama"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )  # fmt: skip
    try:
        assert running.stdout is not None
        said = running.stdout.readline()
        assert said, running.stderr.read() if running.stderr else ""
        yield running, said.split()[-1]
    finally:
        running.kill()
        running.communicate()


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=10)


def test_files_never_run_out_and_a_crash_is_seen_outside(bundles: dict[str, Path]) -> None:
    """128 files and 200 silent connections, whole heads or half ones, with a stream that goes on meanwhile."""
    with process(bundles["llama"], files=128) as (running, url), ExitStack() as stack:
        begun = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        body = {**BODY, "min_tokens": 200, "max_tokens": 200, "stream": True}
        with begun.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for number in range(200):
                one = stack.enter_context(connected(url))
                if number % 2:
                    one.sendall(b"GET /health HTTP/1.1\r\nHost: l")
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        for _ in range(5):
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
            assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=10).status_code == 200
            stack.enter_context(connected(url))
        open_files = len(os.listdir(f"/proc/{running.pid}/fd"))  # noqa: PTH208
        assert 64 < open_files < 128
        running.send_signal(signal.SIGSEGV)  # as a native library would
        assert running.wait(20) == -signal.SIGSEGV
        assert running.stderr is not None
        said = running.stderr.read()
        assert "system resource" not in said  # asyncio's words for EMFILE
        assert "Too many open files" not in said


def test_a_service_that_answers_nothing_any_more_is_not_ready(serve: Serve) -> None:
    """A bug in the generator's thread, and one in a stage's worker."""

    def in_generator(service: Any) -> None:
        service.pipelines["llama"]._executor.generator._events.put(lambda: 1 / 0)
        answer = service.post("completions", **BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")

    def in_worker(service: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda arguments: None)
            service.pipelines["bert"]._executor.lanes.put(0, lambda lane, engine: 1 / 0)
            time.sleep(0.5)

    for break_it, name, said in (
        (in_generator, "llama", "the generator failed: ZeroDivisionError"),
        (in_worker, "bert", "the worker of a stage has ended"),
    ):
        with serve() as service:
            reasons: list[str] = []
            service.server._failed = reasons.append
            assert service.client.get("/health").status_code == 200
            break_it(service)
            answer = service.client.get("/health/ready")
            assert (answer.status_code, answer.json()) == (503, {"status": "broken", "models": [name]})
            assert service.client.get("/health/live").status_code == 200
            deadline = time.monotonic() + 10
            while not reasons:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert said in reasons[0]


def test_a_process_that_answers_nothing_any_more_ends_with_an_error(bundles: dict[str, Path]) -> None:
    with process(bundles["llama"], BREAK) as (running, url):
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=20).status_code == 500
        assert running.wait(20) == 1
        assert running.stderr is not None
        said = running.stderr.read()
    assert "stageline: the generator failed: MemoryError: no more of it; ending" in said


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left by its reader"])
def test_a_service_lives_without_its_stdout(bundles: dict[str, Path], tmp_path: Path, closed: bool) -> None:
    path, (reading, writing) = tmp_path / "s", os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-c",
        MAIN,
        "serve",
        str(bundles["llama"]),
        "--unix-socket",
        str(path),
        "--name",
        "llama",
    ]
    running = subprocess.Popen(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, preexec_fn=(lambda: os.close(1)) if closed else None
    )
    os.close(writing)
    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path), retries=0), base_url="http://localhost"
        ) as client:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert client.post("/v1/completions", json=BODY).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert running.stderr is not None
        assert running.stderr.read() == ""
    finally:
        running.kill()
        running.communicate()


def test_a_compressed_body_is_not_unpacked(service: Any) -> None:
    bomb = gzip.compress(b'{"model": "llama", "prompt": "' + b"a" * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = service.client.post("/v1/completions", content=bomb, headers=headers)
    assert answer.status_code == 415
    assert "send the body as it is, without Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "text"),
    [("completions", "a" * 3_900_000), ("chat/completions", "a " * 200_000), ("embeddings", "\u0301" * 600_000)],
    ids=["one word", "words", "accents"],
)
def test_a_huge_text_holds_nobody_up(service: Any, route: str, text: str) -> None:
    """It is read, or refused for its tokens, and others are answered meanwhile."""
    told: dict[str, Any] = {"chat/completions": {"messages": [{"role": "user", "content": text}]}}
    body = {"model": "bert" if route == "embeddings" else "llama"}
    body |= told.get(route, {"input": text} if route == "embeddings" else {"prompt": text})
    content = json.dumps(body, ensure_ascii=False).encode()
    assert len(content) < 4 * 2**20

    async def ask() -> tuple[int, float]:
        """Its status, and the longest that a probe waited meanwhile."""
        headers, longest_s = {"content-type": "application/json"}, 0.0
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            await client.get("/health/live")
            task = asyncio.create_task(client.post(f"/v1/{route}", content=content, headers=headers))
            while not task.done():
                began = time.perf_counter()
                await client.get("/health/live")
                longest_s = max(longest_s, time.perf_counter() - began)
            return (await task).status_code, longest_s

    status, longest_s = asyncio.run(ask())
    assert status == (400 if " " in text else 200)  # what is no word here is one token
    assert longest_s < 1.0


def test_a_closed_terminal_lets_requests_finish(bundles: dict[str, Path]) -> None:
    body = {**BODY, "min_tokens": 20, "max_tokens": 20, "stream": True}
    with process(bundles["llama"], SLOW) as (running, url), httpx.Client(base_url=url, timeout=30) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGHUP)
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        assert running.wait(20) == 0


def test_a_second_interrupt_does_not_wait(bundles: dict[str, Path]) -> None:
    body = {**BODY, "min_tokens": 120, "max_tokens": 120, "stream": True}
    with process(bundles["llama"], SLOW) as (running, url), httpx.Client(base_url=url, timeout=30) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)  # 6 seconds follow
            running.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert running.poll() is None
            running.send_signal(signal.SIGINT)
            running.wait(20)
            with contextlib.suppress(httpx.HTTPError):
                assert "data: [DONE]" not in list(lines)
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()


def test_a_signal_while_opening_ends_it(bundles: dict[str, Path]) -> None:
    command = [sys.executable, "-c", OPENING + MAIN, "serve", str(bundles["llama"]), "--port", "0"]
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest in the background ignores it
        ) as running:  # fmt: skip
            assert running.stdout is not None
            assert running.stdout.readline() == "opening\n"
            running.send_signal(number)
            said = running.communicate(timeout=20)[1]
            assert running.returncode in (-number, 128 + number)
            assert "Traceback" not in said


def test_more_slots_than_memory_are_refused_in_a_line(bundles: dict[str, Path]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [sys.executable, "-c", MAIN, "serve", str(bundles["llama"]), "--port", "0", "--slots", "3000000"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines()[-1].startswith("stageline: stage 0: no memory for caches of ")

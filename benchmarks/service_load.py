"""Hundreds of connections against `stageline serve`, most of them no model guests: what does the service lose?

Of the connections a third read slowly, a third leave in mid-stream, 40 are hostile (half heads, silence, garbage, heads
that never end, bodies beyond the bound or of a million values), the others ask and read as they should. Answers are
greedy and compared with that which the same prompt got alone. The service runs in a process of its own; its memory,
descriptors and threads are read every minute, and how late its event loop is comes from its own metric.

    python benchmarks/service_load.py bundles/smollm2 --minutes 10 --json benchmarks/results/service_load.json

It exits with 1 if an answer is lost or wrong, a slot is still taken, or if memory, descriptors or threads grow.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from soak import metrics, service

PROMPTS = tuple(
    f"{about} is" for about in ("The sea", "A clock", "Paris", "A train", "Bread", "The moon", "A cat", "Rain")
)
HOSTILE = 40
PATIENCE_S = 600
GROWTH = 1.10
LATE = "stageline_event_loop_delay_seconds"


@dataclass
class Tally:
    """What came of requests and of hostile connections."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)


class WrongError(Exception):
    """An answer that is another than it should be."""


@dataclass
class Load:
    """Where the service is, and what it should answer."""

    host: str
    port: int
    tokens: int
    alone: dict[str, str]
    tally: Tally
    end: float

    async def connected(self, room: int = 2**16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, limit=room)

    def request(self, prompt: str, stream: bool, **more: Any) -> bytes:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": stream,
            **more,
        }
        content = json.dumps({**body, "ignore_eos": True}).encode()
        return _head(len(content)) + content

    async def polite(self, chance: random.Random) -> str:
        """Ask, and read the answer."""
        return await self._asked(chance, stream=chance.random() < 0.5)

    async def slow(self, chance: random.Random) -> str:
        """Ask for a stream, and read it in small pieces with pauses; with log probabilities it is long."""
        logprobs = {"logprobs": 5} if chance.random() < 0.5 else {}
        return await self._asked(chance, True, piece=512, pause_s=chance.uniform(0.02, 0.3), **logprobs)

    async def leaving(self, chance: random.Random) -> str:
        """Ask for a stream, and go after a few bytes, or before the first."""
        reader, writer = await self.connected()
        try:
            writer.write(self.request(chance.choice(PROMPTS), True))
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0, 20)):
                    await reader.read(chance.choice((1, 400, 2000)))
        finally:
            _drop(writer)
        return "left"

    async def _asked(
        self, chance: random.Random, stream: bool, piece: int = 2**16, pause_s: float = 0.0, **more: Any
    ) -> str:
        prompt, answer = chance.choice(PROMPTS), bytearray()
        reader, writer = await self.connected(room=piece)
        try:
            writer.write(self.request(prompt, stream, **more))
            async with asyncio.timeout(PATIENCE_S):
                while got := await reader.read(piece):
                    answer += got
                    await asyncio.sleep(pause_s)
        finally:
            _drop(writer)
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        status = head[9:12].decode()
        if status != "200":
            raise WrongError(f"status {status}: {body[:80]!r}")
        if b"chunked" in head:
            body = _unchunked(body)
        if (text := _text(body, stream)) != self.alone[prompt]:
            raise WrongError(f"{text!r} and not {self.alone[prompt]!r}")
        return "answered" if pause_s == 0 else "answered, read slowly"

    async def hostile(self, chance: random.Random) -> str:
        """Send what is no request, or too much of one; wait until the service has had enough."""
        kind = chance.choice(("silent", "half a head", "endless head", "garbage", "40 MB", "lists", "numbers", "text"))
        big = {"lists": b"[1],", "numbers": b"1,", "text": b"a "}
        reader, writer = await self.connected()
        try:
            if kind == "half a head":
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: local")
            elif kind == "garbage":
                writer.write(chance.randbytes(5000))
            elif kind == "endless head":
                writer.write(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000)
            elif kind == "40 MB":
                writer.write(_head(40_000_000) + b" " * 8_000_000)
            elif kind in big:
                values = big[kind] * ((4 * 2**20 - 200) // len(big[kind]))
                inside = b'"' + values + b'"' if kind == "text" else b"[" + values[:-1] + b"]"
                content = b'{"model": "model", "prompt": ' + inside + b"}"
                writer.write(_head(len(content)) + content)
            async with asyncio.timeout(60):
                answer = await reader.read(100)
            self.tally.statuses[f"{kind}: {answer[9:12].decode('latin-1') or 'closed'}"] += 1
        except (ConnectionError, TimeoutError) as error:
            self.tally.statuses[f"{kind}: {type(error).__name__}"] += 1
        finally:
            _drop(writer)
        await asyncio.sleep(chance.uniform(0.5, 3))
        return "hostile"


def _head(length: int) -> bytes:
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def _drop(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    place = 0
    while True:
        end = body.index(b"\r\n", place)
        length = int(body[place:end], 16)
        if not length:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + length])
        place = end + 4 + length


def _text(body: bytes, stream: bool) -> str:
    if not stream:
        return str(json.loads(body)["choices"][0]["text"])
    events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise WrongError(f"a stream that ends with {events[-1:]}")
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def drive(load: Load, connections: int, seed: int) -> None:
    """Keep as many connections open until the end, each with one thing after the other."""
    third = connections // 3
    kinds: list[Callable[[random.Random], Coroutine[Any, Any, str]]] = [
        *[load.slow] * third, *[load.leaving] * third, *[load.hostile] * HOSTILE,
    ]  # fmt: skip
    kinds += [load.polite] * (connections - len(kinds))

    async def one(number: int, kind: Callable[[random.Random], Coroutine[Any, Any, str]]) -> None:
        chance = random.Random(seed * 1000 + number)
        await asyncio.sleep(chance.uniform(0, 5))
        while time.monotonic() < load.end:
            try:
                load.tally.outcomes[await kind(chance)] += 1
            except WrongError as error:
                load.tally.outcomes["wrong"] += 1
                load.tally.errors[str(error)[:150]] += 1
            except Exception as error:  # any failure is counted
                load.tally.outcomes["lost"] += 1
                load.tally.errors[f"{type(error).__name__}: {error}"[:150]] += 1
                await asyncio.sleep(0.5)

    await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))


def state(process: psutil.Process) -> dict[str, float]:
    """Memory in MiB, descriptors and threads of the service."""
    return {
        "memory_mib": round(process.memory_info().rss / 2**20, 1),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def longest_block_s(found: dict[str, float]) -> float:
    """The lowest bound of the histogram that all delays are within."""
    buckets = {name: count for name, count in found.items() if name.startswith(f"{LATE}_bucket")}
    within = {float(name.split('"')[1]): count for name, count in buckets.items()}
    return min(bound for bound, count in within.items() if count == max(within.values()))


def late_share(found: dict[str, float], over_s: float) -> float:
    """The share of the delays beyond a bound."""
    return 1 - found[f'{LATE}_bucket{{le="{over_s}"}}'] / found[f"{LATE}_count"]


async def watched(load: Load, process: psutil.Process, options: argparse.Namespace) -> list[dict[str, float]]:
    """Drive the load; the service's state by minute."""
    states: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(60)
            states.append(state(process))
            print(f"minute {len(states)}: {states[-1]}, {dict(load.tally.outcomes)}", flush=True)

    watching = asyncio.create_task(watch())
    await drive(load, options.connections, options.seed)
    watching.cancel()
    return states


def main() -> int:
    """Run, print, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with service(options.bundle, options.connections) as (url, process_id):
        process, where = psutil.Process(process_id), urlsplit(url)
        alone = {}
        for prompt in PROMPTS:
            body = {"model": "model", "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120)
            alone[prompt] = answer.json()["choices"][0]["text"]
        before, end = state(process), time.monotonic() + 60 * options.minutes
        assert where.hostname is not None
        assert where.port is not None
        load = Load(where.hostname, where.port, options.tokens, alone, Tally(), end)
        states = asyncio.run(watched(load, process, options))
        deadline = time.monotonic() + 30
        while (found := metrics(url))['stageline_num_requests_running{model="model"}'] and time.monotonic() < deadline:
            time.sleep(0.1)
        after = state(process)
    outcomes = load.tally.outcomes
    rows: dict[str, Any] = {
        "connections": options.connections,
        "minutes": options.minutes,
        **{f"requests {name}": count for name, count in sorted(outcomes.items())},
        "requests lost": outcomes["lost"],
        "requests wrong": outcomes["wrong"],
        "tokens/s": round(found['stageline_generation_tokens_total{model="model"}'] / 60 / options.minutes, 1),
        "slots running at the end": int(found['stageline_num_requests_running{model="model"}']),
        "waiting at the end": int(found['stageline_num_requests_waiting{model="model"}']),
        "event loop: longest delay up to, ms": 1e3 * longest_block_s(found),
        "event loop: mean delay, ms": round(1e3 * found[f"{LATE}_sum"] / found[f"{LATE}_count"], 2),
        "event loop: share over 50 ms": late_share(found, 0.05),
    }
    for name, value in rows.items():
        print(f"{name:<36}{value:>12,}")
    for name, table in (("hostile", load.tally.statuses), ("error", load.tally.errors)):
        for said, count in sorted(table.items()):
            print(f"{name}: {count} x {said}")
    print(f"before {before}, after {after}")
    half = states[len(states) // 2 - 1 :] if len(states) > 1 else states
    grown = [name for name in before if half and half[-1][name] > GROWTH * half[0][name]]
    failures = [
        message
        for message, wrong in {
            "requests were lost": outcomes["lost"],
            "answers were wrong": outcomes["wrong"],
            "slots are still taken": rows["slots running at the end"] or rows["waiting at the end"],
            f"{', '.join(grown)} grew in the second half": grown,
        }.items()
        if wrong
    ]
    print("FAILED: " + "; ".join(failures) if failures else "nothing lost or wrong; memory, descriptors, threads flat")
    if options.json is not None:
        report = {**rows, "hostile": load.tally.statuses, "before": before, "minutes_of": states, "after": after}
        options.json.write_text(json.dumps({**report, "failures": failures}, indent=2) + "\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())

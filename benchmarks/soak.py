"""Many clients at once against `stageline serve`, some of which leave or pause: is anything lost, leaked or growing?

OpenAI's client runs in this process, the service in its own. 15 % of the requests are abandoned in the middle of a
stream or before the answer, 15 % are read with pauses. The others are chats and completions, streamed or whole.

    python benchmarks/soak.py bundles/smollm2 --seconds 300 --json benchmarks/results/soak.json

It exits with 1 if a request that was not abandoned has no answer, if a slot is still taken, if the service's counts do
not add up, or if its memory at the end exceeds that after a tenth of the time by more than 5 %.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

TOPICS = ("the sea", "an old clock", "two cats", "rain in Paris", "a long train journey", "tomatoes", "prime numbers")
SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers briefly."}
GROWTH = 1.05
Body = dict[str, Any]


@dataclass
class Tally:
    """Outcomes of the requests, and times of those answered."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0


@contextmanager
def service(bundle: str, clients: int) -> Iterator[tuple[str, int]]:
    """The address and process id of a running service; SIGTERM ends it."""
    command = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; raise SystemExit(main())"]
    options = ["--name", "model", "--port", "0", "--queue", str(2 * clients)]
    process = subprocess.Popen([*command, "serve", bundle, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the service did not start")
        yield line.split()[-1], process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the service ended with {process.returncode}")
    finally:
        process.kill()


def some_request(chance: random.Random) -> tuple[bool, Body]:
    """Whether the request is a chat, and its body."""
    about = f"Tell me something about {chance.choice(TOPICS)}, number {chance.randrange(1000)}. " * chance.randint(1, 6)
    body: Body = {"model": "model", "max_tokens": chance.randint(4, 48), "seed": chance.randrange(2**31)}
    if chance.random() < 0.7:
        return True, {**body, "messages": [SYSTEM, {"role": "user", "content": about}]}
    return False, {**body, "prompt": about}


async def whole(client: openai.AsyncOpenAI, chat: bool, body: Body) -> int:
    """Ask for an answer in one piece; returns its tokens."""
    create: Any = client.chat.completions.create if chat else client.completions.create
    answer = await create(**body)
    if answer.choices[0].finish_reason not in ("stop", "length"):
        raise ValueError("an answer without a finish_reason")
    return int(answer.usage.completion_tokens)


async def streamed(client: openai.AsyncOpenAI, chat: bool, body: Body, pause_s: float, leave_after: int | None) -> int:
    """Read a stream with pauses; returns its tokens, or 0 if it is left after `leave_after` chunks."""
    create: Any = client.chat.completions.create if chat else client.completions.create
    stream = await create(**body, stream=True, stream_options={"include_usage": True})
    finished, tokens, chunks = False, 0, 0
    async with stream:
        async for chunk in stream:
            chunks += 1
            if leave_after is not None and chunks >= leave_after:
                return 0
            finished = finished or any(choice.finish_reason for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            await asyncio.sleep(pause_s)
    if not finished or not tokens:
        raise ValueError("a stream that ended before its end")
    return tokens


async def one(client: openai.AsyncOpenAI, chance: random.Random, tally: Tally) -> None:
    """Send one request of a random kind."""
    chat, body = some_request(chance)
    kind = chance.choices(("whole", "streamed", "slow", "left", "left before"), (30, 40, 15, 10, 5))[0]
    began = time.perf_counter()
    try:
        if kind == "left before":
            async with asyncio.timeout(chance.uniform(0, 1)):
                await whole(client, chat, body)
            return tally.outcomes.update(["answered"])
        if kind == "whole":
            tally.tokens += await whole(client, chat, body)
        else:
            pause_s = chance.uniform(0.05, 0.3) if kind == "slow" else 0
            leave_after = chance.randint(1, 6) if kind == "left" else None
            tally.tokens += await streamed(client, chat, body, pause_s, leave_after)
    except TimeoutError:
        tally.outcomes["left"] += 1
    except Exception as error:  # any failure is counted
        tally.outcomes["lost"] += 1
        tally.errors[f"{type(error).__name__}: {error}"[:100]] += 1
    else:
        tally.outcomes["left" if kind == "left" else "answered, read slowly" if kind == "slow" else "answered"] += 1
        if kind in ("whole", "streamed"):
            tally.whole_s.append(time.perf_counter() - began)


async def soak(url: str, clients: int, seconds: float, seed: int) -> Tally:
    """Run `clients` clients, each with one request after the other, for `seconds`."""
    tally, end = Tally(), time.monotonic() + seconds
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def client_loop(number: int) -> None:
            chance = random.Random(seed * 1000 + number)
            while time.monotonic() < end:
                await one(client, chance, tally)

        await asyncio.gather(*(client_loop(number) for number in range(clients)))
    return tally


def metrics(url: str) -> dict[str, float]:
    """All metrics, by name with labels."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def resident_mib(process_id: int) -> float:
    """Resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def watched(url: str, process_id: int, options: argparse.Namespace) -> tuple[Tally, list[float]]:
    """Run the soak; also returns the service's memory in MiB at each hundredth of the time."""
    memory: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(options.seconds / 100)
            memory.append(resident_mib(process_id))

    watching = asyncio.create_task(watch())
    tally = await soak(url, options.clients, options.seconds, options.seed)
    watching.cancel()
    return tally, memory


def main() -> int:
    """Run, print a table, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with service(options.bundle, options.clients) as (url, process_id):
        tally, memory = asyncio.run(watched(url, process_id, options))
        deadline = time.monotonic() + 5
        while (end := metrics(url))['stageline_num_requests_running{model="model"}'] and time.monotonic() < deadline:
            time.sleep(0.1)
    outcome = {
        o: int(end[f'stageline_requests_total{{model="model",outcome="{o}"}}']) for o in ("done", "failed", "cancelled")
    }
    asked = sum(tally.outcomes.values())
    percentiles = np.percentile(tally.whole_s, [50, 90, 99]).tolist()
    early, late = memory[len(memory) // 10], memory[-1]
    rows: dict[str, Any] = {
        "clients": options.clients,
        "seconds": options.seconds,
        "requests": asked,
        **{f"requests {name}": count for name, count in sorted(tally.outcomes.items())},
        "requests lost": tally.outcomes["lost"],
        **{f"service: {name}": count for name, count in outcome.items()},
        "slots running at the end": int(end['stageline_num_requests_running{model="model"}']),
        "waiting at the end": int(end['stageline_num_requests_waiting{model="model"}']),
        "tokens/s": round(end['stageline_generation_tokens_total{model="model"}'] / options.seconds, 1),
        "answer p50, s": round(percentiles[0], 2),
        "answer p99, s": round(percentiles[2], 2),
        "ttft mean, s (service)": round(
            end['stageline_time_to_first_token_seconds_sum{model="model"}']
            / end['stageline_time_to_first_token_seconds_count{model="model"}'],
            2,
        ),
        "memory after a tenth, MiB": round(early, 1),
        "memory at the end, MiB": round(late, 1),
        "memory max, MiB": round(max(memory), 1),
    }
    for name, value in rows.items():
        print(f"{name:<28}{value:>12,}")
    for error, count in tally.errors.items():
        print(f"{count} x {error}")
    failures = [
        message
        for message, wrong in {
            "requests were lost": tally.outcomes["lost"],
            "slots are still taken": rows["slots running at the end"] or rows["waiting at the end"],
            "the service failed requests": outcome["failed"],
            "the service's counts do not match the requests": outcome["done"] + outcome["cancelled"] > asked
            or outcome["done"] < asked - tally.outcomes["left"] - tally.outcomes["lost"],
            "memory grew": late > GROWTH * early,
        }.items()
        if wrong
    ]
    print("FAILED: " + "; ".join(failures) if failures else "nothing lost, no slot leaked, memory flat")
    if options.json is not None:
        options.json.write_text(json.dumps({**rows, "failures": failures, "memory_mib": memory}, indent=2) + "\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())

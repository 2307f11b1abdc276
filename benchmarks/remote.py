"""What stages outside of the pipeline's process cost: CPU time and speed beside stages inside, and hops beside raw TCP.

    python benchmarks/remote.py bundles/smollm2 --json benchmarks/results/remote.json

All of it in one run, one after the other in turns, since a machine's speed changes. Stages outside are in processes of
their own on this machine (`isolate`), over the wire that hosts on other machines have. A row is the median over rounds
of the paired ratios. A hop is half of a round trip between two processes.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from stageline.models.errors import WireError
from stageline.runtime import Pipeline
from stageline.runtime.cluster.wire import Wire

PROMPT = "Letter {number}. Dear friend, on the first morning after the long winter I walked down to the harbour and"
SIZES = (2_304, 65_536, 196_608, 1_048_576)  # a row of SmolLM2's hidden state, ..., a row of its logits, ...
KEYS = b"a" * 32, b"b" * 32


def _connected(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    rest = buffer
    while rest:
        count = connection.recv_into(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


def _echo_raw(place: Any, size: int) -> None:
    with socket.create_connection(place) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(size))
        while _receive(connection, buffer):
            connection.sendall(buffer)


def _echo_wire(place: Any, size: int) -> None:
    connection = socket.create_connection(place)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire = Wire(connection, *KEYS).live()
    try:
        while True:
            frame = wire.receive()
            wire.send(frame.kind, frame.message, frame.arrays)
    except WireError:
        pass


def hops(rounds: int, calls: int) -> list[dict[str, float]]:
    """Microseconds one way, raw and by the wire, for each size in bytes."""
    rows = []
    for size in SIZES:
        ends: list[tuple[Callable[[], object], Callable[[], None]]] = []
        processes = []
        for echo in (_echo_raw, _echo_wire):
            listener = socket.create_server(("127.0.0.1", 0))
            process = multiprocessing.get_context("spawn").Process(
                target=echo, args=(listener.getsockname(), size), daemon=True
            )
            process.start()
            processes.append(process)
            ends.append(_raw_end(listener, size) if echo is _echo_raw else _wire_end(listener, size))
        found: list[list[float]] = [[], []]
        for _ in range(rounds):
            for (call, _), times in zip(ends, found, strict=True):
                began = perf_counter()
                for _ in range(calls):
                    call()
                times.append((perf_counter() - began) / calls / 2 * 1e6)
        for _, close in ends:
            close()
        for process in processes:
            process.join()
        raw, wire = (statistics.median(times) for times in found)
        ratio = statistics.median(one / other for one, other in zip(found[1], found[0], strict=True))
        rows.append({"bytes": size, "raw_us": raw, "wire_us": wire, "ratio": ratio})
        print(f"{size:>10,} bytes{raw:>10.0f} us raw{wire:>10.0f} us by the wire{ratio:>8.2f}")
    return rows


def _raw_end(listener: socket.socket, size: int) -> tuple[Callable[[], object], Callable[[], None]]:
    connection, data, buffer = _connected(listener), bytes(size), memoryview(bytearray(size))

    def call() -> None:
        connection.sendall(data)
        _receive(connection, buffer)

    return call, connection.close


def _wire_end(listener: socket.socket, size: int) -> tuple[Callable[[], object], Callable[[], None]]:
    wire, array = Wire(_connected(listener), *reversed(KEYS)).live(), np.zeros(size // 4, np.float32)

    def call() -> None:
        wire.send(1, {"inputs": ["hidden"], "outputs": ["hidden"]}, [array])
        wire.receive()

    return call, wire.close


def _cpu_s() -> float:
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def _generated(pipeline: Pipeline, streams: int, tokens: int) -> tuple[float, float, list[tuple[int, ...]]]:
    """Tokens per second, CPU milliseconds per token, and the tokens."""
    began, cpu = perf_counter(), _cpu_s()
    running = [
        pipeline.generate(PROMPT.format(number=number), max_tokens=tokens, ignore_eos=True) for number in range(streams)
    ]
    done = [tuple(one.result().choices[0].token_ids) for one in running]
    count = streams * tokens
    return count / (perf_counter() - began), (_cpu_s() - cpu) / count * 1e3, done


def generation(bundle: Path, streams: list[int], rounds: int, tokens: int) -> list[dict[str, float]]:
    """A row for each number of streams."""
    rows = []
    options = {"slots": max(streams), "capacity": 256}
    with (
        Pipeline.open(bundle, **options) as inside,  # type: ignore[arg-type]
        Pipeline.open(bundle, isolate=True, **options) as outside,  # type: ignore[arg-type]
    ):
        for count in streams:
            found: list[list[tuple[float, float]]] = [[], []]
            for number in range(rounds + 1):  # the first is to warm up
                said = []
                for pipeline, results in zip((inside, outside), found, strict=True):
                    speed, cpu_ms, out = _generated(pipeline, count, tokens)
                    said.append(out)
                    if number:
                        results.append((speed, cpu_ms))
                if said[0] != said[1]:
                    raise SystemExit(f"the tokens differ at {count} streams")
            (speed, cpu), (own_speed, own_cpu) = (
                (statistics.median(one for one, _ in results), statistics.median(one for _, one in results))
                for results in found
            )
            pairs = list(zip(*found, strict=True))
            ratios = [statistics.median(b[place] / a[place] for a, b in pairs) for place in (0, 1)]
            rows.append(
                {
                    "streams": count,
                    "inside_tokens_per_s": speed,
                    "outside_tokens_per_s": own_speed,
                    "speed_ratio": ratios[0],
                    "inside_cpu_ms": cpu,
                    "outside_cpu_ms": own_cpu,
                    "cpu_ratio": ratios[1],
                }
            )
            print(
                f"{count:>3} streams{speed:>8.1f} tokens/s inside{own_speed:>8.1f} outside{ratios[0]:>7.2f}"
                f"{cpu:>9.1f} ms of CPU a token inside{own_cpu:>8.1f} outside{ratios[1]:>7.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--calls", type=int, default=200, help="of a round of hops")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    streams = [int(count) for count in given.streams.split(",")]
    result = {
        "hops": hops(given.rounds, given.calls),
        "generation": generation(given.bundle, streams, given.rounds, given.tokens),
    }
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

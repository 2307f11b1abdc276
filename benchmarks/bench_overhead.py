"""What measuring costs: throughput alone, with metrics, and with metrics and tracing, in turns.

`off` is the pipeline alone, with requests in progress and no measurement. `metrics` adds what a benchmark and a scraped
service do: every answer is recorded, and the counters are sampled twice a second. `tracing` adds the recorder. The
three take turns in random order, because machines drift. Each is compared with `off` of the same round; the interval
is Student's t over the rounds. CPU time of the process per request is compared as well: it is steadier on a shared
machine. Finally the parts of measuring are timed one by one, in CPU time, and compared with that of a request.

    python benchmarks/bench_overhead.py bundles/minilm --json bench_overhead.json
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from time import perf_counter, process_time
from typing import Any

from stageline.runtime.bench.client import Client
from stageline.runtime.bench.confidence import interval
from stageline.runtime.bench.contenders import PipelineContender, RequestOutcome
from stageline.runtime.bench.energy import Meters, host_memory_bytes
from stageline.runtime.bench.inputs import Item, Maker, Shape
from stageline.runtime.bench.lengths import Lengths
from stageline.runtime.bench.monitor import PERIOD_S, Monitor
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.stages.recorder import Kind, Recorder

MODES = ("off", "metrics", "tracing")
NEW = 16


def bare(pipeline: Pipeline, outputs: list[str] | None, items: list[Item], concurrency: int, seconds: float) -> int:
    """Keep `concurrency` requests in progress for `seconds` without the benchmark's client; returns the answers."""
    ended: SimpleQueue[None] = SimpleQueue()
    sent = answered = 0
    end = perf_counter() + seconds
    while True:
        while sent - answered < concurrency and perf_counter() < end:
            item = items[sent % len(items)]
            if item.output_tokens is None:
                future: Any = pipeline.submit(item.inputs, outputs)
            else:
                sampling = Sampling(max_tokens=item.output_tokens, min_tokens=item.output_tokens)
                future = pipeline.submit(GenerationRequest(item.rows[0], sampling))
            future.add_done_callback(lambda future: ended.put(None))
            sent += 1
        if sent == answered:
            return answered
        ended.get()
        answered += 1


def one(
    mode: str, contender: PipelineContender, items: list[Item], concurrency: int, seconds: float
) -> dict[str, float]:
    """Requests per second, and CPU seconds per request."""
    pipeline = contender.pipeline
    assert pipeline is not None
    client, meters = Client(contender, items, Event()), Meters()
    used, began = process_time(), perf_counter()
    with ExitStack() as stack:
        if mode == "off":
            answered = bare(pipeline, contender.outputs, items, concurrency, seconds)
        else:
            stack.enter_context(Monitor(contender, client, meters, began))
            pipeline.record(Recorder() if mode == "tracing" else None)
            answered = len(client.closed_loop(concurrency, seconds).requests)
            pipeline.record(None)
        taken = perf_counter() - began
    meters.close()
    return {"requests_per_s": answered / taken, "cpu_s": (process_time() - used) / answered}


def parts(pipeline: Pipeline, contender: PipelineContender, items: list[Item]) -> dict[str, float]:
    """The time of each part of measuring alone, in seconds."""

    class Answered:
        """A contender that answers immediately."""

        name, pipeline = "nothing", None

        def submit(self, item: Item) -> "Future[RequestOutcome]":
            outcome: Future[RequestOutcome] = Future()
            outcome.set_result(RequestOutcome(perf_counter()))
            return outcome

        def close(self) -> None: ...

    class Run:
        number = 0

        def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
            return "decode", 8, 1, (1, 2, 3, 4, 5, 6, 7, 8)

    def per_call(do: Callable[[], object], times: int) -> float:
        began = process_time()
        for _ in range(times):
            do()
        return (process_time() - began) / times

    recorder, run, client = Recorder(), Run(), Client(Answered(), items, Event())
    began = process_time()
    requests = len(client.open_loop([0.0] * 20_000).requests)
    return {
        "record_a_run_s": per_call(lambda: recorder.ran(0, 1.0, 2.0, run), 50_000),
        "write_a_request_s": (process_time() - began) / requests,
        "take_a_sample_s": per_call(lambda: (pipeline.stats(), host_memory_bytes()), 500),
    }


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with Pipeline.open(options.bundle, queue=256) as pipeline:
        new = NEW if pipeline.capacity else None
        shape = Shape(output_tokens=None if new is None else Lengths(new, new))
        items, _ = Maker(pipeline.bundle, shape, pipeline.capacity, 0).items(Lengths(32, 32))
        contender = PipelineContender("stageline", pipeline)
        seen: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        order = random.Random(0)
        for mode in MODES:  # warm
            one(mode, contender, items, options.concurrency, 1.0)
        for _ in range(options.rounds):
            for mode in order.sample(MODES, len(MODES)):
                seen[mode].append(one(mode, contender, items, options.concurrency, options.seconds))
        direct = parts(pipeline, contender, items)
        stages = len(pipeline.stats().stages)
    results: dict[str, Any] = {"bundle": options.bundle.name, "rounds": options.rounds, "seconds": options.seconds}
    print(f"{options.bundle.name}: {options.rounds} rounds of {options.seconds:g} s, {options.concurrency} at a time")
    print(f"{'':<10}{'requests/s':>12}{'slower, %':>12}{'95 %':>18}{'CPU ms/request':>18}{'more, %':>10}{'95 %':>18}")
    for mode in MODES:
        row: dict[str, Any] = {
            name: statistics.median(r[name] for r in seen[mode]) for name in ("requests_per_s", "cpu_s")
        }
        for name, sign in (("requests_per_s", -1), ("cpu_s", 1)):
            change = [100 * sign * (r[name] / off[name] - 1) for r, off in zip(seen[mode], seen["off"], strict=True)]
            row[f"{name}_cost_percent"] = statistics.mean(change)
            row[f"{name}_cost_interval"] = interval(change)
        results[mode] = row
        costs = [row[f"{name}_cost_percent"] for name in ("requests_per_s", "cpu_s")]
        spans = [row[f"{name}_cost_interval"] or (0.0, 0.0) for name in ("requests_per_s", "cpu_s")]
        ranges = [f"{low:+.2f} to {high:+.2f}" for low, high in spans]
        print(
            f"{mode:<10}{row['requests_per_s']:>12.1f}{costs[0]:>12.2f}{ranges[0]:>18}"
            f"{row['cpu_s'] * 1e3:>18.2f}{costs[1]:>10.2f}{ranges[1]:>18}"
        )
    cpu_s, rate = (statistics.median(r[name] for r in seen["off"]) for name in ("cpu_s", "requests_per_s"))
    runs = stages * ((new or 0) + 1) if new else stages  # of stages per request, if no step were shared
    metrics_s = direct["write_a_request_s"] + direct["take_a_sample_s"] / PERIOD_S / rate
    direct["metrics_percent"] = 100 * metrics_s / cpu_s
    direct["tracing_percent"] = 100 * (metrics_s + runs * direct["record_a_run_s"]) / cpu_s
    results["parts"] = direct
    record, write, sample = (1e6 * direct[f"{name}_s"] for name in ("record_a_run", "write_a_request", "take_a_sample"))
    print(
        f"by parts: {record:.1f} us to record a run, {write:.1f} us to record a request, {sample:.0f} us per sample\n"
        f"of a request's CPU time: metrics {direct['metrics_percent']:.2f} %, with tracing "
        f"{direct['tracing_percent']:.2f} % (at most {runs} runs of stages)"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

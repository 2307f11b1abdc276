"""Synthetic runs from a seed, for tests and store benchmarks: shaped like real ones, with invented figures."""

from collections.abc import Sequence

import numpy as np
from stageline.runtime.bench.records import (
    ANSWERED,
    FAILED,
    Environment,
    Figure,
    Layout,
    Load,
    Measurement,
    Requests,
    Run,
    RunSettings,
    Series,
    Slo,
    StageUsage,
    Timeline,
    ladder,
)
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.recorder import RequestSpan, Span

REPEATS = 3


def requests(count: int, seed: int = 0) -> Requests:
    """`count` requests that arrive at random; one in a thousand failed."""
    draw = np.random.default_rng(seed)
    latency = draw.lognormal(-3.0, 0.4, count).astype(np.float32)
    return Requests(
        (np.arange(count) * REPEATS // max(1, count)).astype(np.uint16),
        np.cumsum(draw.exponential(1e-3, count)),
        draw.exponential(1e-5, count).astype(np.float32),
        latency * np.float32(0.3),
        latency,
        draw.integers(3, 60, count).astype(np.uint32),
        draw.integers(1, 48, count).astype(np.uint32),
        np.where(draw.random(count) < 1e-3, FAILED, ANSWERED).astype(np.uint8),
    )


def measurement(of: Requests, contender: str, load: Load, speed: float, seed: int = 0) -> Measurement:
    """A measurement with such requests, `speed` times as fast."""
    draw = np.random.default_rng(seed)

    def figure(unit: str, value: float, higher: bool = False) -> Figure:
        return Figure.of(unit, "higher" if higher else "lower", (value * draw.normal(1, 0.01, REPEATS)).tolist())

    seconds = 30.0
    p50, p99 = np.percentile(of.latency_s, (50, 99)).tolist()
    samples = np.linspace(0, seconds, 60)
    return Measurement(
        contender,
        load,
        seconds,
        len(of),
        {
            "requests_per_s": figure("requests/s", speed * 20, higher=True),
            "tokens_per_s": figure("tokens/s", speed * 480, higher=True),
            "latency_p50_s": figure("s", p50 / speed),
            "latency_p99_s": figure("s", p99 / speed),
            "ttft_p99_s": figure("s", 0.3 * p99 / speed),
            "bubble_ratio": figure("", 0.2),
        },
        {"latency_s": ladder(of.latency_s), "ttft_s": ladder(of.first_token_s), "tpot_s": ladder(of.tpot_s)},
        tuple(StageUsage(stage, 15, f"cpu:{stage}", 900, 24.0 - stage, 0.1, 5.9 + stage) for stage in range(2)),
        Series(tuple(samples.tolist()), {"requests_per_s": tuple(draw.normal(20, 1, 60).tolist())}),
        ("no energy: no counter is readable",) if contender == "stageline" else (),
    )


def run(number: int, loads: Sequence[Load] = (Load("Server", rate_per_s=20.0),), count: int = 200) -> Run:
    """A run of the pipeline and a baseline under each load, with `count` requests each. `number` ends its id."""
    asked = requests(count, number)
    contenders = {"stageline": 1.0 + number % 5 / 100, "onnxruntime": 0.9}
    return Run(
        f"20260101-000000-{number:05d}",
        f"synthetic {number}",
        1_767_225_600.0 + 600 * number,
        f"bundles/model{number % 4}",
        f"{number % 4:064x}",
        "LlamaForCausalLM",
        "text-generation",
        "float32",
        RunSettings(tuple(loads), REPEATS, 10.0, 2.0, 0, "24 built-in texts", 1, 24, Slo(1.0, 0.2, 0.05),
                 ("onnxruntime",), PipelineOptions(devices=["cpu"], threads=2)),
        Layout((15, 15), ("cpu:0", "cpu:1")),
        Environment("a CPU", 2, 24 << 30, None, "Linux", {"onnxruntime": "1.32.0"}, "0123456"),
        "done",
        None,
        1_767_225_700.0 + 600 * number,
        measurements=tuple(
            measurement(asked, contender, load, speed, number)
            for load in loads
            for contender, speed in contenders.items()
        ),
    )  # fmt: skip


def timeline(micro_batches: int, seed: int = 0) -> Timeline:
    """Two stages that take turns, with occasional idle time."""
    draw = np.random.default_rng(seed)
    taken = draw.uniform(0.008, 0.012, (micro_batches, 2))
    free, spans, asked = [0.0, 0.0], [], []
    for number in range(micro_batches):
        arrived = free[0]
        for stage in range(2):
            began = max(free[stage], arrived)
            arrived = free[stage] = began + float(taken[number, stage])
            spans.append(Span(stage, "decode", number, began, arrived, 4, 1, (number // 8,)))
        if number % 8 == 7:
            asked.append(RequestSpan(number // 8, spans[-16].began_s, arrived))
    return Timeline(tuple(spans), tuple(asked))

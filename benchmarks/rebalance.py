"""Rebalancing while serving: an uneven cut, a stage on a slowed core, and other numbers of stages.

Eight streams generate without end, each the same text again and again: whatever happens to the stages, the tokens must
equal those of an undisturbed run. Throughput is that of the seconds before and after each changeover.

    python benchmarks/rebalance.py bundles/smollm2 --json benchmarks/results/rebalance.json

`uneven`: two stages cut 25/5 on purpose, mode auto. `slowed`: auto, from the even cut; a process that computes without
end is pinned to the core of stage 0, and stopped later. `scaled`: by hand from 2 stages to 1 and back. `--scenario`
runs only one (each takes two minutes); `--json` keeps the others in the file.
"""

import argparse
import json
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.options import RebalanceMode
from stageline.runtime.pipeline import Pipeline

STREAMS, PROMPT, NEW, CAPACITY = 8, 64, 64, 256  # tokens
PATIENCE_S = 30.0  # time for auto mode to find another cut
MEASURE_S = 8.0
Row = dict[str, Any]


class Load:
    """Streams that generate until the load is closed, and the times of their tokens."""

    def __init__(self, pipeline: Pipeline, prompts: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]):
        self.pipeline, self.expected = pipeline, expected
        self.times: list[list[float]] = [[] for _ in prompts]
        self.texts = self.wrong = 0
        self._stop = False
        self._threads = [
            threading.Thread(target=self._stream, args=(number, prompt)) for number, prompt in enumerate(prompts)
        ]
        for thread in self._threads:
            thread.start()

    def _stream(self, number: int, prompt: tuple[int, ...]) -> None:
        while not self._stop:
            tokens: list[int] = []
            for piece in self.pipeline.start(GenerationRequest(prompt, sampling())):
                tokens += piece.token_ids
                self.times[number].append(time.perf_counter())
            self.texts += 1
            self.wrong += tuple(tokens) != self.expected[number]

    def during(self, what: str, act: Callable[[], object]) -> Row:
        """Throughput and gaps while `act` runs; how busy the stages were, or the figures of a changeover."""
        before, began = self.pipeline.stats(), time.perf_counter()
        act()
        after, ended = self.pipeline.stats(), time.perf_counter()
        times = [[at for at in stream if began <= at < ended] for stream in map(list, self.times)]
        gaps = np.concatenate([np.diff(stream) for stream in times])
        row: Row = {
            "what": what,
            "layers": list(after.layers),
            "seconds": ended - began,
            "tokens_per_s": sum(map(len, times)) / (ended - began),
            "gap_p50_ms": 1e3 * float(np.median(gaps)),
            "gap_max_ms": 1e3 * float(gaps.max()),
            "memory_mib": memory_mib(),
        }
        if after.changeovers == before.changeovers:
            pairs = zip(before.stages, after.stages, strict=True)
            row["busy"] = [(now.busy_s - then.busy_s) / (ended - began) for then, now in pairs]
        elif after.last_changeover is not None:
            row |= {"switches": after.changeovers - before.changeovers, "open_s": after.last_changeover.open_s}
            row["pause_ms"] = 1e3 * after.last_changeover.pause_s
        return row

    def measure(self, what: str) -> Row:
        """Measure the next seconds."""
        return self.during(what, lambda: time.sleep(MEASURE_S))

    def until_another_cut(self, what: str) -> Row:
        """Measure until half a second after auto mode has switched to another cut."""
        switches = self.pipeline.stats().changeovers

        def wait() -> None:
            ends = time.monotonic() + PATIENCE_S
            while self.pipeline.stats().changeovers == switches and time.monotonic() < ends:
                time.sleep(0.02)
            time.sleep(0.5)

        return self.during(what, wait)

    def close(self) -> None:
        """Let each stream finish its text."""
        self._stop = True
        for thread in self._threads:
            thread.join()


class Bench:
    """The scenarios on a bundle."""

    def __init__(self, bundle: Path, quantise: Any) -> None:
        self.bundle, self.quantise = bundle, quantise
        rng = np.random.default_rng(0)
        self.prompts = [tuple(rng.integers(3, 40_000, PROMPT).tolist()) for _ in range(STREAMS)]
        with self.open(None, "off") as pipeline:
            futures = [pipeline.submit(GenerationRequest(prompt, sampling())) for prompt in self.prompts]
            self.expected = [future.result().choices[0].token_ids for future in futures]
            self.layers = pipeline.layers

    def open(self, layers: Sequence[int] | None, rebalance: RebalanceMode) -> Pipeline:
        """Open the bundle, recut before anything runs."""
        options: dict[str, Any] = {"slots": STREAMS, "capacity": CAPACITY, "quantise": self.quantise}
        pipeline = Pipeline.open(self.bundle, rebalance=rebalance, **options)
        if layers is not None:
            pipeline.recut(layers)
        return pipeline

    @contextmanager
    def load(self, layers: Sequence[int], rebalance: RebalanceMode, rows: list[Row]) -> Iterator[Load]:
        """Streams on a pipeline; adds a row on whether their tokens were right."""
        with self.open(layers, rebalance) as pipeline:
            load = Load(pipeline, self.prompts, self.expected)
            try:
                time.sleep(2)
                yield load
            finally:
                load.close()
            stats = pipeline.stats().generation
            assert stats is not None
            rows.append({"what": "texts", "texts": load.texts, "wrong": load.wrong, "failed": stats.failed})

    def uneven(self) -> Iterator[Row]:
        """25/5, evened by auto mode."""
        ends: list[Row] = []
        with self.load([25, 5], "off", ends) as load:
            yield load.measure("25/5, mode off")
        with self.load([25, 5], "auto", ends) as load:
            yield load.until_another_cut("auto mode switches")
            yield load.measure("after")
            yield load.until_another_cut("does it continue?")
            yield load.measure("at the end")
        yield from ends

    def slowed(self) -> Iterator[Row]:
        """The core of stage 0, shared with another process for a while."""
        ends: list[Row] = []
        with self.load(self.layers, "auto", ends) as load:
            yield load.until_another_cut("auto mode, undisturbed")
            yield load.measure("before")
            before = load.pipeline.layers
            with competitor(load.pipeline.stats().stages[0].cores[0]):
                yield load.until_another_cut("the other process begins")
                yield load.measure("after, still shared")
            yield load.until_another_cut("the other process has ended")
            yield load.measure("after that")
        with self.load(before, "off", ends) as load, competitor(load.pipeline.stats().stages[0].cores[0]):
            time.sleep(1)
            yield load.measure("shared, mode off")
        yield from ends

    def scaled(self) -> Iterator[Row]:
        """From 2 stages to 1 and back to 2 by hand."""
        ends: list[Row] = []
        with self.load(self.layers, "off", ends) as load:
            yield load.measure("2 stages")
            yield load.during("recut(1)", lambda: load.pipeline.recut(1))
            yield load.measure("1 stage")
            yield load.during("recut(2)", lambda: load.pipeline.recut(2))
            yield load.measure("2 stages again")
        yield from ends


def memory_mib() -> float:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def sampling() -> Sampling:
    """Greedy, NEW tokens."""
    return Sampling(max_tokens=NEW, min_tokens=NEW)


@contextmanager
def competitor(core: int) -> Iterator[None]:
    """A process that computes on one core without end."""
    process = multiprocessing.get_context("spawn").Process(target=compute, args=(core,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def compute(core: int) -> None:
    """Compute without end."""
    os.sched_setaffinity(0, {core})
    while True:
        sum(range(100_000))


def shown(row: Row) -> str:
    """A line of the table."""
    if "texts" in row:
        return f"  {row['texts']} texts, {row['wrong']} of them wrong, {row['failed']} requests failed"
    layers = "/".join(map(str, row["layers"]))
    line = f"  {row['what']:28}{layers:>8}{row['tokens_per_s']:10.0f}{row['gap_p50_ms']:9.0f}{row['gap_max_ms']:9.0f}"
    line += f"{row['memory_mib']:9.0f}"
    if "busy" in row:
        return line + "   busy " + " ".join(f"{busy:.0%}" for busy in row["busy"])
    return line + f"   in {row['seconds']:.1f} s: opened in {row['open_s']:.1f} s, pause {row['pause_ms']:.0f} ms"


def main() -> None:
    """Run the scenarios, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scenario", choices=("uneven", "slowed", "scaled"), action="append")
    parser.add_argument("--quantise", "--weights", choices=("int8", "int4"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    bench = Bench(arguments.bundle, arguments.quantise)
    print(f"  {'':28}{'layers':>8}{'tokens/s':>10}{'gap ms':>9}{'max':>9}{'MiB':>9}")
    for name in arguments.scenario or ("uneven", "slowed", "scaled"):
        print(name)
        rows = []
        for row in getattr(bench, name)():
            rows.append(row)
            print(shown(row), flush=True)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  peak memory {peak_mib:.0f} MiB")
        found[name] = {"rows": rows, "peak_mib": peak_mib, "quantise": arguments.quantise}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

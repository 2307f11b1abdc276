"""The planner's predictions against the pipeline: stages, uneven cuts, threads, batch sizes, and Poisson load.

It runs in parts of a few minutes. The JSON file keeps their results, where the next part looks for them:

    profile:1      for stages of one thread      profile:2      for stages of two
    batches:1      every cut on one core         poisson:1      one stage under Poisson load
    batches:2      every cut on two              poisson:2      two stages
    batches:wide   one stage with two threads

Batches are submitted all at once. Requests for generation arrive at random, at shares of the throughput when all come
at once; the runtime's own scheduler simulates the prediction. Predictions use only the profile. Each round of a case
also times a reference, on as many cores at once. Its slowdown since the profile is the drift of the machine, not an
error of the prediction. Each case waits until other processes use less than a tenth of a core. A disturbed case is
measured again, up to twice, and then left out of the summary. With `--more` a part measures only cuts that are missing
from the JSON file or were disturbed.

    python benchmarks/planner.py bundles/minilm bundles/smollm2 --json benchmarks/results/planner.json
    python benchmarks/planner.py bundles/smollm2 --part profile:1 --part poisson:2 --json planner.json
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut, recut_copy
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, others_cpu_s, pin, share_cores
from stageline.runtime.engines import StageFile, engine_factory
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.planning.cost import use_costs
from stageline.runtime.planning.measure import measure, undisturbed
from stageline.runtime.planning.profile import Machine, MachineProfile
from stageline.runtime.planning.simulate import (
    BatchRequest,
    Setting,
    SimulatedStage,
    SimulationResult,
    TextRequest,
    simulate_batches,
    simulate_generation,
)
from stageline.runtime.planning.timings import Timings
from stageline.runtime.workload import Shape, poisson

PARTS = {  # threads of a stage
    "profile:1": 1, "batches:1": 1, "batches:2": 1, "poisson:2": 1,
    "profile:2": 2, "batches:wide": 2, "poisson:1": 2,
}  # fmt: skip
RUN_S = 0.4  # about how long a batch run takes
ROUNDS = 5  # batch runs of a case: the median counts
REFERENCE_S, REFERENCE_RUNS, SHORT_REFERENCE_S = 1.0, 3, 0.2  # min
CALM, MAX_WAIT_S = 0.1, 20  # share of a core; before a case
LOADS = (0.5, 0.8, 0.95)  # of the capacity
FAR = 0.25  # an error that is counted separately
SLOTS, CAPACITY, CHUNK, PROMPT, OUTPUT = 8, 256, 64, 40, 24
ENCODER_SHAPES = ((1, 32), (4, 128), (8, 64), (16, 32), (6, 100))
DECODER_SHAPES = ((1, 16), (1, 48), (4, 32))
REFERENCE = (4, 32)


def cuts(blocks: int) -> list[list[int]]:
    """Blocks per stage: one to four stages, even and uneven."""
    third, half = blocks // 3, blocks // 2
    found = [
        [blocks],
        [half, blocks - half],
        [blocks - blocks // 6, blocks // 6],
        [third, blocks - third],
        [third, third, blocks - 2 * third],
        [blocks // 6, third, blocks - third - blocks // 6],
        [blocks // 6, third, third, blocks - 2 * third - blocks // 6],
    ]
    return [counts for counts in found if min(counts) > 0]


def _say(share: float, step: str) -> None:
    print(f"# {share:.0%} {step}", flush=True)


class Reference:
    """The whole model on each core alone: its times show the current speed of the machine."""

    def __init__(self, path: Path, feed: dict[str, Any]) -> None:
        bundle = Bundle.open(path)
        (stage,) = bundle.manifest.stages
        file = StageFile(0, path / stage.file, path, stage.caches)
        values = Signature.of(bundle.manifest).check_inputs(feed)[0]
        self._workers = [ThreadPoolExecutor(1, initializer=partial(pin, (core,))) for core in allowed_cores()]
        self._engines = [
            worker.submit(engine_factory("onnxruntime"), file, CpuDevice((core,))).result()
            for worker, core in zip(self._workers, allowed_cores(), strict=True)
        ]
        self._run = [partial(engine.run, values, engine.output_names[:1]) for engine in self._engines]

    def times_s(self, min_s: float, min_runs: int) -> tuple[float, ...]:
        """The median time of a run on 1, 2, ... cores at once, each for at least `min_s` and `min_runs`."""
        return tuple(self.time_s(count, min_s, min_runs) for count in range(1, len(self._workers) + 1))

    def time_s(self, cores: int, min_s: float, min_runs: int) -> float:
        """The median time of a run on this number of cores."""

        def median() -> float:
            taken: list[float] = []
            while sum(taken) < min_s or len(taken) < min_runs:
                began = perf_counter()
                for future in [
                    worker.submit(run) for worker, run in zip(self._workers[:cores], self._run[:cores], strict=True)
                ]:
                    future.result()
                taken.append(perf_counter() - began)
            return statistics.median(taken)

        return undisturbed(median)[0]

    def close(self) -> None:
        """Free the engines."""
        for worker, engine in zip(self._workers, self._engines, strict=True):
            worker.submit(engine.close).result()
            worker.shutdown()


class Bench:
    """A copy of a bundle to cut, its profile, and the reference's times during the profile."""

    def __init__(self, path: Path, known: dict[str, Any] | None, threads: int, passes: int):
        """`known`: the result of `as_data`; None: profile now."""
        self.path, self.bundle = path, Bundle.open(path)
        self.vocabulary = self.bundle.manifest.vocabulary or 1000
        whole = recut_copy(path, path.with_name("reference"), 1)
        self._reference = Reference(whole.path, self.feed(*REFERENCE))
        if known is None:
            before = self._reference.times_s(REFERENCE_S, REFERENCE_RUNS)
            self.profile = measure(self.bundle, [threads], None, _say, passes)
            after = self._reference.times_s(REFERENCE_S, REFERENCE_RUNS)
            self._before_s = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
        else:
            self.profile, self._before_s = MachineProfile.model_validate(known["profile"]), known["reference_s"]
        parts = self.bundle.parts()
        costs = cache(lambda shape: tuple(use_costs(self.bundle.manifest, self.bundle.tensors, parts, shape)))
        self._timings = cache(lambda count: Timings(self.profile, self.bundle.manifest, count, costs))

    def as_data(self) -> dict[str, Any]:
        """What later parts need."""
        return {"reference_s": self._before_s, "profile": self.profile.model_dump(mode="json")}

    def drift(self, cores: int, min_s: float = REFERENCE_S, min_runs: int = REFERENCE_RUNS) -> float:
        """The reference's current time on this number of cores, relative to that during the profile."""
        return self._reference.time_s(cores, min_s, min_runs) / self._before_s[cores - 1]

    def feed(self, rows: int, tokens: int) -> dict[str, Any]:
        """A batch of random tokens."""
        return {"input_ids": np.random.default_rng(0).integers(100, self.vocabulary, (rows, tokens))}

    def setting(self, counts: Sequence[int], threads: int) -> Setting:
        """The pipeline that `Pipeline.open` makes of these cuts on `threads` cores."""
        ends = list(np.cumsum(counts))
        shares = share_cores(len(counts), allowed_cores()[:threads])
        stages = []
        for count, end, share in zip(counts, ends, shares, strict=True):
            timings = self._timings(len(share))
            stages.append(
                SimulatedStage(
                    self._stage(timings, int(end - count), int(end)), share[0], contention=self._contention(timings)
                )
            )
        host = self.profile.host_step_s, self.profile.host_row_s
        return Setting(tuple(stages), host_step_s=host[0], host_row_s=host[1], packs=True)

    def _stage(self, timings: Timings, first: int, end: int) -> Callable[[Shape], float]:
        handover_s = self.profile.handover_s if first else 0.0
        return cache(lambda shape: timings.of(shape).stage_s(first, end) + handover_s)

    def _contention(self, timings: Timings) -> Callable[[Shape], float]:
        return cache(lambda shape: timings.of(shape).contention)

    def close(self) -> None:
        """Free the reference."""
        self._reference.close()


def wait_for_calm() -> None:
    """Wait for a second in which other processes use hardly any CPU, up to MAX_WAIT_S."""
    for _ in range(MAX_WAIT_S):
        before_s = others_cpu_s()
        time.sleep(1)
        if others_cpu_s() - before_s < CALM:
            return


def batch_cases(bench: Bench, threads: int, chosen: Sequence[list[int]]) -> Iterator[dict[str, Any]]:
    """Batches per second, predicted and measured, for every chosen cut and shape."""
    print("      layers  threads  rows x tokens predicted/s  measured/s    error    drift   others")
    for counts in chosen:
        recut(bench.path, counts)
        setting = bench.setting(counts, threads)
        with Pipeline.open(bench.path, threads=threads, queue=512) as pipeline:
            for rows, tokens in DECODER_SHAPES if bench.bundle.manifest.cached else ENCODER_SHAPES:
                request = BatchRequest(0.0, rows, tokens)
                lone_s = simulate_batches(setting, [request]).duration_s
                count = max(4, min(400, round(RUN_S / lone_s * len(counts))))
                predicted_s = simulate_batches(setting, [request] * count).duration_s
                wait_for_calm()
                real_s, drift, others = _batches_s(bench, threads, pipeline, bench.feed(rows, tokens), count)
                case = {
                    "layers": counts, "threads": threads, "rows": rows, "tokens": tokens,
                    "predicted_per_s": count / predicted_s, "measured_per_s": count / real_s,
                    "error": real_s / predicted_s - 1, "drift": drift, "others": others,
                }  # fmt: skip
                layers = ",".join(map(str, counts))
                print(
                    f"{layers:>12}{threads:>9}{rows:>6} x {tokens:<5}{case['predicted_per_s']:>12.2f}"
                    f"{case['measured_per_s']:>12.2f}{case['error']:>9.1%}{drift - 1:>9.1%}{others:>9.1%}",
                    flush=True,
                )
                yield case


def _batches_s(
    bench: Bench, cores: int, pipeline: Pipeline, feed: dict[str, Any], count: int
) -> tuple[float, float, float]:
    """The time of `count` batches submitted at once, the drift meanwhile, and the share of a core that others used."""

    def run() -> float:
        began = perf_counter()
        for future in [pipeline.submit(feed) for _ in range(count)]:
            future.result()
        return perf_counter() - began

    pipeline.run(feed)
    rounds = ((bench.drift(cores, SHORT_REFERENCE_S, 1), undisturbed(run)) for _ in range(ROUNDS))
    drifts, found = zip(*rounds, strict=True)
    taken, others = zip(*found, strict=True)
    return statistics.median(taken), statistics.median(drifts), statistics.median(others)


def poisson_cases(bench: Bench, stages: int, requests: int) -> Iterator[dict[str, Any]]:
    """Throughput and percentiles under Poisson load at shares of the measured capacity, simulated and measured."""
    recut(bench.path, stages)
    counts = Bundle.open(bench.path).manifest.layers
    setting = bench.setting(counts, len(allowed_cores()))
    capacity = 0.0
    print(f"{'layers':>10}{'load':>6}  {'':<14}{'predicted':>12}{'measured':>12}{'error':>9}{'drift':>9}{'others':>9}")
    for load in (None, *LOADS):  # None: all at once, which is the capacity
        arrivals = [0.0] * requests if load is None else poisson(load * capacity, requests, seed=4)
        wait_for_calm()
        drift = bench.drift(len(allowed_cores()))
        texts = [TextRequest(t, PROMPT, OUTPUT) for t in arrivals]
        predicted = _figures(simulate_generation(setting, texts, SLOTS, CAPACITY, CHUNK))
        began, others_s = perf_counter(), others_cpu_s()
        real = _generate(bench, arrivals)
        others = (others_cpu_s() - others_s) / (perf_counter() - began)
        capacity = capacity or real["tokens_per_s"] / OUTPUT
        case = {
            "layers": counts,
            "load": load,
            "requests_per_s": capacity * (load or 1),
            "drift": drift,
            "others": others,
        }
        for name, value in predicted.items():
            shown = "all" if load is None else f"{load:.0%}"
            print(
                f"{','.join(map(str, counts)):>10}{shown:>6}  {name:<14}{value:>12.4f}{real[name]:>12.4f}"
                f"{real[name] / value - 1:>9.1%}{drift - 1:>9.1%}{others:>9.1%}",
                flush=True,
            )
        yield {**case, "predicted": predicted, "measured": real}


def _figures(report: SimulationResult) -> dict[str, float]:
    return {
        "tokens_per_s": report.tokens_per_s, "ttft_p50_s": report.ttft.p50, "ttft_p99_s": report.ttft.p99,
        "tpot_p50_s": report.tpot.p50, "tpot_p99_s": report.tpot.p99,
    }  # fmt: skip


def _generate(bench: Bench, arrivals: Sequence[float]) -> dict[str, float]:
    """Send requests at their arrival times, and time their tokens."""
    random = np.random.default_rng(1)
    sampling = Sampling(max_tokens=OUTPUT, min_tokens=OUTPUT)
    prompts = [tuple(map(int, random.integers(100, bench.vocabulary, PROMPT))) for _ in range(len(arrivals) + 1)]
    with Pipeline.open(bench.path, slots=SLOTS, capacity=CAPACITY, prefill_chunk=CHUNK, queue=4096) as pipeline:
        pipeline.submit(GenerationRequest(prompts.pop(), sampling)).result()
        futures, begun = [], perf_counter()
        for at_s, prompt in zip(arrivals, prompts, strict=True):
            time.sleep(max(0.0, begun + at_s - perf_counter()))
            futures.append(pipeline.submit(GenerationRequest(prompt, sampling)))
        done = [future.result() for future in futures]
        taken_s = perf_counter() - begun - arrivals[0]
    first = [completion.ttft_s for completion in done]
    later = [(completion.token_times_s[-1] - completion.ttft_s) / (OUTPUT - 1) for completion in done]
    return {
        "tokens_per_s": len(done) * OUTPUT / taken_s,
        "ttft_p50_s": float(np.percentile(first, 50)),
        "ttft_p99_s": float(np.percentile(first, 99)),
        "tpot_p50_s": float(np.percentile(later, 50)),
        "tpot_p99_s": float(np.percentile(later, 99)),
    }


def summary(parts: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Median and worst error of the undisturbed batch cases, with and without the drift."""
    every = [case for name, part in parts.items() if name.startswith("batches") for case in part]
    cases = [case for case in every if case["others"] < CALM]
    if not cases:
        return {}
    sizes = [abs(case["error"]) for case in cases]
    steady = [abs((1 + case["error"]) / case["drift"] - 1) for case in cases]
    return {
        "cases": len(cases), "disturbed_cases": len(every) - len(cases),
        "median_error": statistics.median(sizes), "worst_error": max(sizes),
        "median_error_without_drift": statistics.median(steady), "worst_error_without_drift": max(steady),
    }  # fmt: skip


def report(bundle: str, entry: dict[str, Any]) -> None:
    """Print the errors of the batch cases, per part and in all."""
    for part, cases in entry.get("parts", {}).items():
        if part.startswith("batches") and cases:
            sizes = [abs(case["error"]) for case in cases]
            print(
                f"{bundle}, {part}: {len(sizes)} cases, median error {statistics.median(sizes):.1%}, worst "
                f"{max(sizes):.1%}, beyond {FAR:.0%}: {sum(size > FAR for size in sizes)}"
            )
    for name, value in entry.get("summary", {}).items():
        print(f"{bundle}: {name.replace('_', ' ')} {f'{value:.1%}' if 'error' in name else value}")


def undisturbed_cuts(found: Sequence[dict[str, Any]], shapes: int) -> list[dict[str, Any]]:
    """The cases of cuts that were measured for all shapes without disturbance."""
    calm = [tuple(case["layers"]) for case in found if case["others"] < CALM]
    return [case for case in found if calm.count(tuple(case["layers"])) == shapes]


def run_part(
    source: Path, part: str, entry: dict[str, Any], arguments: argparse.Namespace, keep: Callable[[], None]
) -> None:
    """Run a part on a copy of the bundle and put its results into the bundle's entry; calls `keep` after each case."""
    kind, _, number = part.partition(":")
    threads = PARTS[part]
    profiles = entry.setdefault("profiles", {})
    if kind != "profile" and str(threads) not in profiles:
        raise SystemExit(f"{part} needs profile:{threads} of {source.name}; run that part first")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(source, Path(folder) / source.name))
        bench = Bench(path, None if kind == "profile" else profiles[str(threads)], threads, arguments.passes)
        every = cuts(bench.bundle.manifest.blocks)
        try:
            if kind == "profile":
                profiles[str(threads)] = bench.as_data()
                return keep()
            parts = entry.setdefault("parts", {})
            shapes = len(DECODER_SHAPES if bench.bundle.manifest.cached else ENCODER_SHAPES)
            found = undisturbed_cuts(parts.get(part, []), shapes) if arguments.more and kind == "batches" else []
            left = [counts for counts in every if counts not in [case["layers"] for case in found]]
            if part == "batches:wide":
                cases = batch_cases(bench, 2, [counts for counts in left if len(counts) == 1])
            elif kind == "batches":
                cases = batch_cases(bench, int(number), [counts for counts in left if len(counts) >= int(number)])
            else:
                cases = poisson_cases(bench, int(number), arguments.requests)
            parts[part] = found
            for case in cases:
                found.append(case)
                entry["summary"] = summary(entry["parts"])
                keep()
        finally:
            bench.close()


def main() -> None:
    """Run parts, print tables, merge the figures into JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="exported bundles; copied, not changed")
    parser.add_argument("--part", choices=PARTS, action="append", help="run only this part (repeatable)")
    parser.add_argument("--more", action="store_true", help="measure only missing and disturbed cuts")
    parser.add_argument("--summary", action="store_true", help="measure nothing, show the JSON file")
    parser.add_argument("--requests", type=int, default=60, help="requests of a Poisson run")
    parser.add_argument("--passes", type=int, default=3, help="passes of a profile")
    parser.add_argument("--json", type=Path, help="write the figures here; those of other parts stay")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"bundles": {}}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    results["machine"] = str(Machine.here())

    def keep() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    for source in arguments.bundles:
        cached = Bundle.open(source).manifest.cached
        entry = results["bundles"].setdefault(source.name, {})
        for part in (
            []
            if arguments.summary
            else arguments.part or [part for part in PARTS if cached or not part.startswith("poisson")]
        ):
            print(f"{source.name}, {part}, {results['machine']}")
            run_part(source, part, entry, arguments, keep)
        report(source.name, entry)


if __name__ == "__main__":
    main()

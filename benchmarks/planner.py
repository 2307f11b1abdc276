"""What the planner predicts beside what the pipeline does: stages, uneven cuts, threads, batch sizes, and Poisson load.

Each bundle is profiled, then cut in several ways and run: batches in a closed loop (all submitted at once), and, for a
model that generates, requests at random times at parts of its capacity. Predictions come from the profile alone; the
generation runs are simulated with the runtime's own scheduler.

    python benchmarks/planner.py bundles/minilm bundles/smollm2 --json benchmarks/results/planner.json
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from stageline.runtime.bundle import Bundle, recut
from stageline.runtime.devices.cpu import allowed_cores, share_cores
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.planning.cost import Shape, use_costs
from stageline.runtime.planning.profile import Machine, Profile, load, measure, save
from stageline.runtime.planning.simulate import (
    BatchRequest,
    Setting,
    SimulatedStage,
    TextRequest,
    poisson,
    simulate_batches,
    simulate_generation,
)
from stageline.runtime.planning.timings import Timings

RUN_S = 0.6  # about how long a batch run takes
LOADS = (0.5, 0.8, 0.95)  # of the capacity
SLOTS, CAPACITY, CHUNK, PROMPT, OUTPUT = 8, 256, 64, 40, 24
ENCODER_SHAPES = ((1, 32), (4, 128), (8, 64), (16, 32), (6, 100))
DECODER_SHAPES = ((1, 16), (1, 48), (4, 32))


def cuts(blocks: int) -> list[list[int]]:
    """Numbers of blocks: one to four stages, even and uneven."""
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


class Predictor:
    """Stage times of a bundle from its profile."""

    def __init__(self, bundle: Bundle, profile: Profile):
        self.bundle, self.profile = bundle, profile
        parts = bundle.parts()
        costs = cache(lambda shape: tuple(use_costs(bundle.manifest, bundle.tensors, parts, shape)))
        self.timings = cache(lambda threads: Timings(profile, bundle.manifest, threads, costs))

    def setting(self, counts: Sequence[int], threads: int) -> Setting:
        """The pipeline that `Pipeline.open` makes of these cuts on so many threads."""
        ends = list(np.cumsum(counts))
        shares = share_cores(len(counts), allowed_cores()[:threads])
        return Setting(
            tuple(
                SimulatedStage(self._stage(int(end - count), int(end), len(share)), share[0])
                for count, end, share in zip(counts, ends, shares, strict=True)
            )
        )

    def _stage(self, first: int, end: int, threads: int) -> Callable[[Shape], float]:
        timings = self.timings(threads)
        return cache(lambda shape: timings.of(shape).stage_s(first, end) + self.profile.handover_s)


def batch_cases(path: Path, predictor: Predictor, rounds: int) -> list[dict[str, Any]]:
    """Micro-batches a second, predicted and measured, for every cut, number of threads and shape."""
    cached = predictor.bundle.manifest.cached
    vocabulary = predictor.bundle.manifest.vocabulary or 1000
    cases = []
    for counts in cuts(predictor.bundle.manifest.blocks):
        recut(path, counts)
        for threads in (1, 2):
            setting = predictor.setting(counts, threads)
            with Pipeline.open(path, threads=threads, queue=512) as pipeline:
                for rows, tokens in DECODER_SHAPES if cached else ENCODER_SHAPES:
                    lone_s = simulate_batches(setting, [BatchRequest(0.0, rows, tokens)], rows).duration_s
                    count = max(4, min(400, round(RUN_S / lone_s * len(counts))))
                    told_s = simulate_batches(setting, [BatchRequest(0.0, rows, tokens)] * count, rows).duration_s
                    ids = np.random.default_rng(0).integers(100, vocabulary, (rows, tokens))
                    feed = {"input_ids": ids}
                    pipeline.run(feed)
                    taken = []
                    for _ in range(rounds):
                        began = perf_counter()
                        for future in [pipeline.submit(feed) for _ in range(count)]:
                            future.result()
                        taken.append(perf_counter() - began)
                    real_s = min(taken)  # what disturbs a run only adds to it; the profile is taken alike
                    cases.append(
                        {
                            "layers": counts, "threads": threads, "rows": rows, "tokens": tokens,
                            "predicted_per_s": count / told_s, "measured_per_s": count / real_s,
                            "error": real_s / told_s - 1,
                        }
                    )  # fmt: skip
                    _print_case(cases[-1])
    return cases


def _print_case(case: dict[str, Any]) -> None:
    layers = ",".join(map(str, case["layers"]))
    print(
        f"{layers:>12}{case['threads']:>9}{case['rows']:>6} x {case['tokens']:<5}"
        f"{case['predicted_per_s']:>12.2f}{case['measured_per_s']:>12.2f}{case['error']:>9.1%}",
        flush=True,
    )


def generation_cases(path: Path, predictor: Predictor, counts: Sequence[int], requests: int) -> list[dict[str, Any]]:
    """Throughput and percentiles under Poisson load, simulated and measured."""
    recut(path, counts)
    setting = predictor.setting(counts, len(allowed_cores()))
    flood = [TextRequest(0.0, PROMPT, OUTPUT)] * requests
    capacity = simulate_generation(setting, flood, SLOTS, CAPACITY, CHUNK).requests_per_s
    cases = []
    for share in LOADS:
        arrivals = poisson(share * capacity, requests, seed=4)
        told = simulate_generation(setting, [TextRequest(t, PROMPT, OUTPUT) for t in arrivals], SLOTS, CAPACITY, CHUNK)
        real = _generate(path, arrivals, predictor.bundle.manifest.vocabulary or 1000)
        predicted = {
            "tokens_per_s": told.tokens_per_s, "ttft_p50_s": told.ttft.p50, "ttft_p99_s": told.ttft.p99,
            "tpot_p50_s": told.tpot.p50, "tpot_p99_s": told.tpot.p99,
        }  # fmt: skip
        cases.append(
            {"layers": list(counts), "load": share, "rate": share * capacity, "predicted": predicted, "measured": real}
        )
        for name, value in predicted.items():
            print(
                f"{share:>6.0%}  {name:<14}{value:>12.4f}{real[name]:>12.4f}{real[name] / value - 1:>9.1%}", flush=True
            )
    return cases


def _generate(path: Path, arrivals: Sequence[float], vocabulary: int) -> dict[str, float]:
    """Send requests at their times and time their tokens."""
    random = np.random.default_rng(1)
    sampling = Sampling(max_tokens=OUTPUT, min_tokens=OUTPUT)
    prompts = [tuple(map(int, random.integers(100, vocabulary, PROMPT))) for _ in range(len(arrivals) + 1)]
    with Pipeline.open(path, slots=SLOTS, capacity=CAPACITY, prefill_chunk=CHUNK, queue=4096) as pipeline:
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


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median and worst of the errors' sizes."""
    sizes = [abs(case["error"]) for case in cases]
    return {"cases": len(sizes), "median_error": statistics.median(sizes), "worst_error": max(sizes)}


def main() -> None:
    """Profile, predict, measure, print tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="exported bundles; they are copied, not changed")
    parser.add_argument("--rounds", type=int, default=4, help="runs of a batch case, of which the fastest counts")
    parser.add_argument("--requests", type=int, default=60, help="of a Poisson run")
    parser.add_argument(
        "--keep-profile", action="store_true", help="use the profile in the bundle if it is this machine's"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": str(Machine.here()), "bundles": {}}
    for source in arguments.bundles:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copytree(source, Path(folder) / source.name))
            bundle = Bundle.open(path)
            if not arguments.keep_profile:
                save(bundle, measure(bundle))
            profile, warning = load(path, Machine.here())
            if warning:
                raise SystemExit(warning)
            predictor = Predictor(bundle, profile)
            print(f"{source.name}, {results['machine']}")
            print("      layers  threads  rows x tokens predicted/s  measured/s    error")
            cases = batch_cases(path, predictor, arguments.rounds)
            told = summary(cases)
            print(f"{told['cases']} cases, median error {told['median_error']:.1%}, worst {told['worst_error']:.1%}")
            results["bundles"][source.name] = {**told, "batches": cases}
            if bundle.manifest.cached:
                half = bundle.manifest.blocks // 2
                results["bundles"][source.name]["generation"] = [
                    case
                    for counts in ([2 * half + bundle.manifest.blocks % 2], [half, bundle.manifest.blocks - half])
                    for case in generation_cases(path, predictor, counts, arguments.requests)
                ]
        if arguments.json:  # after each bundle: the next one takes minutes
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

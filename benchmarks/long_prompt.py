"""What a long prompt costs those who are being answered: their times between tokens while it is read, without a target
for these and with some, one after the other.

    python benchmarks/long_prompt.py bundles/smollm2 --targets none,100,200 --json benchmarks/results/long_prompt.json

Streams draw tokens throughout; then prompts of `--prompt` tokens come, one after the other. A row is of the tokens that
the streams got while one was being read.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from stageline.runtime import Pipeline


def _prompts(rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
    return [rng.integers(1000, 40_000, length).tolist() for _ in range(count)]


def measured(bundle: Path, target: float | None, given: argparse.Namespace) -> dict[str, Any]:
    """One pipeline of a target (seconds)."""
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"engine": given.engine, "slots": given.streams + 1, "capacity": 2048}
    with Pipeline.open(bundle, tpot_target=target, **options) as pipeline:
        keep = {"max_tokens": given.tokens, "ignore_eos": True, "temperature": 1.0}
        streams = [
            pipeline.generate(prompt, seed=n, **keep) for n, prompt in enumerate(_prompts(rng, given.streams, 64))
        ]
        windows, ttft = [], []
        for prompt in _prompts(rng, given.rounds, given.prompt):
            time.sleep(given.pause)
            began = time.perf_counter()
            ttft.append(pipeline.generate(prompt, max_tokens=1).result().ttft_s)
            windows.append((began, time.perf_counter()))
        done = [stream.result() for stream in streams]
        last = min(one.submitted_s + one.token_times_s[-1] for one in done)
        if windows[-1][1] > last:
            sys.exit("the streams ended before the last prompt was read; give more --tokens")
    waits: list[float] = []
    alone: list[float] = []
    for one in done:
        times = [one.submitted_s + at for at in one.token_times_s]
        for before, after in pairwise(times):
            inside = any(began < after and before < end for began, end in windows)
            (waits if inside else alone).append(after - before)
    p50, p99, most = np.percentile(waits, [50, 99, 100]).tolist()
    return {
        "target_ms": None if target is None else 1e3 * target,
        "alone_p50_ms": 1e3 * float(np.median(alone)),
        "tpot_p50_ms": 1e3 * p50,
        "tpot_p99_ms": 1e3 * p99,
        "tpot_max_ms": 1e3 * most,
        "ttft_s": float(np.median(ttft)),
    }


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--targets", default="none,200,100", help="ms")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before each long prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(f"{'target ms':>10}{'alone p50':>11}{'TPOT p50':>10}{'p99':>8}{'max':>8}{'TTFT s':>8}")
    rows = []
    for target in given.targets.split(","):
        rows.append(row := measured(given.bundle, None if target == "none" else float(target) / 1e3, given))
        print(
            f"{target:>10}{row['alone_p50_ms']:11.0f}{row['tpot_p50_ms']:10.0f}{row['tpot_p99_ms']:8.0f}"
            f"{row['tpot_max_ms']:8.0f}{row['ttft_s']:8.2f}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

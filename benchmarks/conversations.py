"""What a prefix cache gives conversations that come back: more of them than slots, each of several turns, in turn.

    python benchmarks/conversations.py bundles/smollm2 --json benchmarks/results/conversations.json

In each round all conversations go on, as many at a time as there are slots: the prompt of a turn is all that was said
before and a new question. A row is of the turns after the first ones. All rows must have the same tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def measured(given: argparse.Namespace, megabytes: int | None) -> dict[str, Any]:
    """One pipeline with a prefix cache of so many MB."""
    from stageline.runtime import Pipeline

    rng = np.random.default_rng(0)
    opening = rng.integers(1000, 40_000, 40).tolist()  # all begin with the same instructions
    talks = [
        [*opening, *rng.integers(1000, 40_000, rng.integers(20, 120)).tolist()] for _ in range(given.conversations)
    ]
    questions = rng.integers(1000, 40_000, (given.turns, given.conversations, 30))
    prompt_tokens = cached = 0
    ttft: list[float] = []
    options: dict[str, Any] = {"prefix_cache": None if megabytes is None else 10**6 * megabytes}
    with Pipeline.open(
        given.bundle, engine=given.engine, slots=given.slots, capacity=1024, queue=given.slots, **options
    ) as pipeline:
        began = time.perf_counter()
        for turn in range(given.turns):
            for first in range(0, given.conversations, given.slots):
                now = range(first, min(first + given.slots, given.conversations))
                running = [pipeline.generate(talks[n], max_tokens=given.tokens, ignore_eos=True) for n in now]
                for number, one in zip(now, [generation.result() for generation in running], strict=True):
                    talks[number] += [*one.choices[0].token_ids, *questions[turn, number].tolist()]
                    if turn:
                        prompt_tokens, cached = prompt_tokens + one.prompt_tokens, cached + one.cached_tokens
                        ttft.append(one.ttft_s)
        seconds = time.perf_counter() - began
    p50, p99 = np.percentile(ttft, [50, 99]).tolist()
    return {
        "prefix_cache_mb": megabytes,
        "prompt_tokens": prompt_tokens,
        "cached": cached / prompt_tokens,
        "ttft_p50_s": p50,
        "ttft_p99_s": p99,
        "seconds": seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "tokens": talks,
    }


def main() -> None:
    """Measure each size in a process of its own, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--prefix-cache", default="none,500,3500", help="MB")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measured(given, None if given.only == "none" else int(given.only))))
        return
    print(
        f"{'prefix cache':>13}{'prompt tokens':>15}{'found':>7}{'TTFT p50':>10}{'p99':>7}{'seconds':>9}{'RSS':>9}  same"
    )
    rows: list[dict[str, Any]] = []
    wanted = None
    for size in given.prefix_cache.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", size]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        tokens = row.pop("tokens")
        wanted = wanted or tokens
        row["same"] = sum(one == other for one, other in zip(tokens, wanted, strict=True))
        rows.append(row)
        print(
            f"{size:>10} MB{row['prompt_tokens']:15,}{row['cached']:7.1%}{row['ttft_p50_s']:10.2f}"
            f"{row['ttft_p99_s']:7.2f}{row['seconds']:9.1f}{row['peak_rss_mb']:6.0f} MB{row['same']:6}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

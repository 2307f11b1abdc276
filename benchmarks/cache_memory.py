"""What the KV cache takes for many conversations of different lengths, and what a smaller one costs.

64 conversations of 20 to 1,900 tokens run at a time, in slots of 2,048 tokens, on the engine whose caches are blocks:
with all the memory that the slots could fill, then with shares of it. All conversations must end with the same tokens.

    python benchmarks/cache_memory.py bundles/smollm2 --json benchmarks/results/cache_memory.json
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

CAPACITY, NEW, SHARES = 2048, 16, (1.0, 0.5, 0.25, 0.125)


def measured(bundle: str, conversations: int, memory: int) -> dict[str, Any]:
    """One pipeline with caches of `memory` bytes."""
    from stageline.runtime.generation.request import GenerationRequest, Sampling
    from stageline.runtime.pipeline import Pipeline

    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 1901 - NEW, conversations)
    sampling = Sampling(max_tokens=NEW, min_tokens=NEW)
    with Pipeline.open(
        bundle, engine="openvino", slots=conversations, capacity=CAPACITY, queue=conversations, cache_memory=memory
    ) as pipeline:
        began, usage, running = time.perf_counter(), 0.0, 0
        prompts = [tuple(rng.integers(3, 40_000, length).tolist()) for length in lengths]
        futures = [pipeline.submit(GenerationRequest(prompt, sampling)) for prompt in prompts]
        while not all(future.done() for future in futures):
            time.sleep(0.05)
            found = pipeline.stats().generation
            assert found is not None
            usage, running = max(usage, found.cache_usage), max(running, found.running)
        tokens = [future.result().choices[0].token_ids for future in futures]
        seconds = time.perf_counter() - began
        found = pipeline.stats().generation
        assert found is not None
    return {
        "memory_bytes": memory,
        "filled": usage,
        "running": running,
        "set_back": found.set_back,
        "seconds": seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "tokens": tokens,
    }


def main() -> None:
    """Measure each share in a process of its own, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measured(arguments.bundle, arguments.conversations, arguments.memory)))
        return
    from stageline.runtime.bundle.folder import Bundle

    caches = [spec for stage in Bundle.open(arguments.bundle).manifest.stages for spec in stage.caches]
    whole = arguments.conversations * CAPACITY * sum(4 * c.heads * (c.key_size + c.value_size) for c in caches)
    found: list[dict[str, Any]] = []
    wanted: list[list[int]] = []
    print(f"{'cache':>10} {'filled':>7} {'at a time':>10} {'set back':>9} {'seconds':>8} {'peak RSS':>10} {'same':>5}")
    for share in SHARES:
        command = [sys.executable, __file__, arguments.bundle, "--conversations", str(arguments.conversations)]
        out = subprocess.run([*command, "--memory", str(int(whole * share))], check=True, stdout=subprocess.PIPE).stdout
        one = json.loads(out)
        tokens = one.pop("tokens")
        wanted = wanted or tokens
        one["same"] = sum(a == b for a, b in zip(tokens, wanted, strict=True))
        found.append(one)
        print(
            f"{one['memory_bytes'] / 1e6:7.0f} MB {one['filled']:7.1%} {one['running']:10} {one['set_back']:9} "
            f"{one['seconds']:8.1f} {one['peak_rss_mb']:7.0f} MB {one['same']:5}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

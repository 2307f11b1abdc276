"""Host time of a decode step without the engines: scheduling, hops, sampling, detokenising, streaming.

The engines of the stages do nothing here and return the same logits each time; everything else runs as in a service.
The time of a step is then the overhead. A step is one token for every row of a group; N stages have N groups.

    python benchmarks/generation_host.py bundles/smollm2 --json benchmarks/results/generation_host.json
"""

import argparse
import json
import statistics
from pathlib import Path

from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.request import Sampling
from stageline.runtime.planning.host import bundle_decoder, step_s

TOKENS = 400


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="for its tokenizer and vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    decoder = bundle_decoder(Bundle.open(arguments.bundle))
    kinds = {
        "greedy": Sampling(max_tokens=TOKENS),
        "temperature 0.8, top-k 50": Sampling(max_tokens=TOKENS, temperature=0.8, top_k=50, seed=1),
    }
    rows = []
    print(f"{'':28}{'streams':>8}{'stages':>8}{'us/step':>11}{'us/token':>12}")
    for kind, sampling in kinds.items():
        for streams, stages in ((1, 1), (8, 1), (32, 1), (8, 2), (32, 2)):
            found = [1e6 * step_s(decoder, streams, stages, sampling) for _ in range(arguments.rounds)]
            step_us = statistics.median(found)
            token_us = step_us / (streams / min(stages, streams))
            rows.append({"sampling": kind, "streams": streams, "stages": stages, "step_us": step_us, "all": found})
            print(f"{kind:28}{streams:8}{stages:8}{step_us:11.0f}{token_us:12.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

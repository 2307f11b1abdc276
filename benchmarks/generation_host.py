"""Host time of a decode step without the engines: scheduling, hops, sampling, detokenising, streaming.

The engines of the stages do nothing here and return the same logits each time; everything else runs as in a service.
The time of a step is then the overhead. A step is one token for every row of a group; N stages have N groups. The
second time is that of all cores. Texts are made while the next step computes: so a stage that takes a millisecond for
a step waits less from one step to the next, which is the third time.

    python benchmarks/generation_host.py bundles/smollm2 --json benchmarks/results/generation_host.json
"""

import argparse
import json
import statistics
from pathlib import Path

from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.request import Sampling
from stageline.runtime.planning.host import bundle_decoder, host_times

TOKENS = 400
BUSY_S = 1e-3


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
    print(f"{'':28}{'streams':>8}{'stages':>8}{'us/step':>11}{'us/token':>12}{'CPU us/step':>13}{'us idle':>9}")
    for kind, sampling in kinds.items():
        for streams, stages in ((1, 1), (8, 1), (32, 1), (8, 2), (32, 2)):
            found = [host_times(decoder, streams, stages, sampling) for _ in range(arguments.rounds)]
            step_us = 1e6 * statistics.median(one.step_s for one in found)
            cpu_us = 1e6 * statistics.median(one.cpu_s for one in found)
            token_us = step_us / (streams / min(stages, streams))
            row = {"sampling": kind, "streams": streams, "stages": stages, "step_us": step_us, "cpu_us": cpu_us}
            row["all"] = [1e6 * one.step_s for one in found]
            idle = ""
            if stages == 1:  # with more, a stage waits for the others as well
                busy = [host_times(decoder, streams, 1, sampling, BUSY_S).idle_s for _ in range(arguments.rounds)]
                row["idle_us"] = 1e6 * statistics.median(busy)
                idle = f"{row['idle_us']:.0f}"
            rows.append(row)
            print(f"{kind:28}{streams:8}{stages:8}{step_us:11.0f}{token_us:12.0f}{cpu_us:13.0f}{idle:>9}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

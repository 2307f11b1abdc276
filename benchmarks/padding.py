"""How many tokens the stages compute for each one that is wanted, by the shape of a step: exact, and quick.

The scheduler's own steps, for prompts of all lengths that wait for a slot while others decode. Each step takes as long
as its tokens. A range of slots computes the padding of its rows and the slots without new tokens; packed tokens none.

    python benchmarks/padding.py --json benchmarks/results/padding.json
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from stageline.runtime.planning.simulate import Setting, SimulatedStage, TextRequest, simulate_generation
from stageline.runtime.workload import Shape

CAPACITY, CHUNK, REQUESTS = 2048, 128, 200
TOKEN_S, STEP_S = 0.0014, 0.02


def computed(requests: list[TextRequest], slots: int, packs: bool) -> tuple[int, float]:
    """The tokens that one stage computes, and the seconds until all is done."""
    tokens = 0

    def seconds(shape: Shape) -> float:
        nonlocal tokens
        tokens += shape.batch * shape.length
        return max(STEP_S, TOKEN_S * shape.batch * shape.length)

    setting = Setting((SimulatedStage(seconds, 0),), packs=packs)
    report = simulate_generation(setting, requests, slots, CAPACITY, CHUNK)
    return tokens, report.duration_s


def main() -> None:
    """Count, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'prompts of':>12} {'new tokens':>11} {'slots':>6} {'steps':>16} {'computed':>9} {'seconds':>8}")
    for longest, new, slots in itertools.product((64, 200, 1000), (48,), (8, 32)):
        draw = random.Random(0)
        requests = [TextRequest(0.0, draw.randint(1, longest), draw.randint(1, new)) for _ in range(REQUESTS)]
        wanted = sum(request.prompt + request.output - 1 for request in requests)
        for name, packs in (("ranges of slots", False), ("packed tokens", True)):
            tokens, seconds = computed(requests, slots, packs)
            share = tokens / wanted
            found = {"longest": longest, "new": new, "slots": slots, "packs": packs, "computed": share}
            rows.append({**found, "seconds": seconds})
            print(f"{f'1 to {longest}':>12} {f'1 to {new}':>11} {slots:6} {name:>16} {share:9.3f} {seconds:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

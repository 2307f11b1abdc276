"""Blocks spread evenly over stages by the weights that they multiply.

The planner (planning/partition.py) is exact for real devices with links and memory. Export and recut know no devices,
and the bundle must not depend on the planner.
"""

import itertools
import math
from collections.abc import Sequence

import onnx_ir as ir
from stageline.runtime.bundle.manifest import UncutManifest


def part_costs(manifest: UncutManifest, parts: Sequence[ir.Model]) -> list[int]:
    """The cost of each use in order (prologue, blocks, epilogue): the number of weights that multiply each token."""
    costs = []
    for use in manifest.uses:
        graph = parts[use.part].graph
        looked_up = {node.inputs[0].name for node in graph if node.op_type == "Gather" and node.inputs[0] is not None}
        weights = manifest.parts[use.part].weights
        costs.append(sum(math.prod(map(int, w.shape)) for w in weights if w.name not in looked_up))
    return costs


def balance(costs: Sequence[int], stages: int) -> list[int]:
    """The number of blocks in each stage that makes the costliest stage cheapest. `costs` starts with the prologue
    (part of the first stage) and ends with the epilogue (part of the last). Exact, by dynamic programming over the
    cuts."""
    blocks = len(costs) - 2
    total = list(itertools.accumulate(costs[1:-1], initial=0))

    def cost(first: int, end: int) -> int:
        return total[end] - total[first] + (costs[0] if first == 0 else 0) + (costs[-1] if end == blocks else 0)

    # best[end]: (costliest stage, sum of squares for evenness among equals, cuts) of the first `end` blocks
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for _ in range(stages):
        best = {
            end: min(
                (max(worst, cost(first, end)), squares + cost(first, end) ** 2, (*cuts, end))
                for first, (worst, squares, cuts) in best.items()
                if first < end
            )
            for end in range(1, blocks + 1)
            if any(first < end for first in best)
        }
    cuts = best[blocks][2]
    return [end - first for first, end in zip((0, *cuts), cuts, strict=False)]

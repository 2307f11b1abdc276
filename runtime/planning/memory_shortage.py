"""Why no plan fits: which stage lacks memory, and how much, in the plan that lacks least."""

from dataclasses import dataclass, replace

import numpy as np
from stageline.runtime.planning.partition import best_plan
from stageline.runtime.planning.paths import Tables
from stageline.runtime.planning.problem import Plan, PlannedStage, Problem


@dataclass(frozen=True)
class Shortage:
    """With `short_bytes` more on each device `plan` fits; with less no plan does. `stage` is the one that lacks
    them."""

    short_bytes: float
    stage: PlannedStage
    plan: Plan


def smallest_shortage(problem: Problem) -> Shortage | None:
    """The minimum of additional memory on every device; None if links or pinned layers allow no plan at all."""
    excess = Tables(problem, None).excess_bytes
    steps = np.unique(excess[np.isfinite(excess) & (excess > 0)])
    low, high = 0, len(steps)  # bounds of the first step with which a plan fits
    found = None
    while low < high:
        middle = (low + high) // 2
        plan = best_plan(_with_more(problem, float(steps[middle])), "latency")
        if plan is None:
            low = middle + 1
        else:
            high, found = middle, plan
    if found is None:
        return None
    shorts = [
        figures.memory_bytes - problem.devices[stage.device].memory_bytes
        for stage, figures in zip(found.stages, found.figures, strict=True)
    ]
    worst = int(np.argmax(shorts))
    return Shortage(float(steps[low]), found.stages[worst], found)


def _with_more(problem: Problem, count_bytes: float) -> Problem:
    devices = tuple(replace(device, memory_bytes=device.memory_bytes + count_bytes) for device in problem.devices)
    return replace(problem, devices=devices)

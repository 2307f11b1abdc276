"""The best contiguous cut for different devices, exactly.

Every objective is A + T x W: A and W are sums over the stages, T is the longest time of a stage (the bottleneck).

    throughput  A = 0                          W = 1
    latency     A = compute + copy             W = 0
    cost        A = 0                          W = price of the stage's devices
    energy      A = (busy - idle W) x compute  W = idle power of the stage's devices

If T is bounded and W multiplied by a number, the best plan is a shortest path over cuts (`paths.py`). T is one of the
finitely many times that a stage can take. For an interval of these times, the path that is bounded by its upper end and
multiplies W by its lower end is a lower bound of all plans. Intervals that cannot beat the best plan so far are
dropped, others are halved. If the objective is the bottleneck alone, this is a binary search.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from stageline.runtime.planning.paths import BoundedPaths, Chain, Floats, Question, Tables
from stageline.runtime.planning.problem import Objective, Plan, PlannedStage, Problem

_CLOSE = 1e-12  # relative: closer values are equal, summed in another order


def best_plan(problem: Problem, objective: Objective = "throughput") -> Plan | None:
    """The plan of the smallest `objective`, or None if no plan fits. Among plans with the same bottleneck,
    `throughput` takes one of minimal latency."""
    return _best(Tables(problem, None), objective)


def runner_up(problem: Problem, objective: Objective, best: Plan) -> Plan | None:
    """The best plan that differs from `best` in a cut or a device; None if there is no other.

    Such a plan lacks a stage of `best`, so it is the best of those found with one of these stages forbidden.
    """
    others = [_best(Tables(problem, stage), objective) for stage in best.stages]
    found = [plan for plan in others if plan is not None]
    return min(found, key=lambda plan: (plan.value(objective), plan.latency_s), default=None)


@dataclass(frozen=True)
class _Weights:
    """A and W of an objective: A = `compute`[device] x compute + `copy` x copy, W = `device`[device] + `plan` once."""

    compute: Floats
    copy: float
    device: Floats
    plan: float

    @classmethod
    def of(cls, problem: Problem, objective: Objective) -> "_Weights":
        devices = problem.devices
        none = np.zeros(len(devices))
        if objective == "throughput":
            return cls(none, 0.0, none, 1.0)
        if objective == "latency":
            return cls(none + 1, 1.0, none, 0.0)
        if objective == "cost":
            return cls(none, 0.0, np.array([device.price_per_h / 3600 for device in devices]), 0.0)
        idle = np.array([device.idle_w for device in devices])
        return cls(np.array([device.busy_w for device in devices]) - idle, 0.0, idle, 0.0)

    def question(self, bound_s: float, bottleneck_s: float) -> Question:
        return Question(bound_s, self.compute, self.copy, self.device * bottleneck_s)

    def value(self, plan: Plan, bottleneck_s: float) -> float:
        """A + `bottleneck_s` x W of a plan."""
        total = self.plan * bottleneck_s
        for stage, figures in zip(plan.stages, plan.figures, strict=True):
            total += self.compute[stage.device] * figures.compute_s + self.copy * figures.copy_s
            total += bottleneck_s * self.device[stage.device] * stage.replicas
        return float(total)


def _best(tables: Tables, objective: Objective) -> Plan | None:
    problem = tables.problem
    paths = Chain.in_order(tables) if problem.counts is None else BoundedPaths(tables)
    best = _branch(tables, paths, _Weights.of(problem, objective))
    if best is None or objective != "throughput":
        return best
    question = _Weights.of(problem, "latency").question(best.bottleneck_s * (1 + _CLOSE), 0.0)
    stages, answered = paths.relaxed(question)
    return _planned(problem, stages if answered else paths.shortest(question)) or best


def _branch(tables: Tables, paths: Chain | BoundedPaths, weights: _Weights) -> Plan | None:
    times = tables.stage_times()
    rate = weights.plan + float(weights.device.min())
    best, value = None, np.inf
    heap = [(times[low] * rate, low, high, False) for low, high in _intervals(tables.problem, times, weights)]
    heapq.heapify(heap)
    while heap:
        lower, low, high, bounded = heapq.heappop(heap)
        if lower >= value * (1 - _CLOSE):
            break
        question = weights.question(times[high], times[low])
        stages, answered = (paths.shortest(question), True) if bounded else paths.relaxed(question)
        plan = _planned(tables.problem, stages)
        if plan is None:
            continue
        if not answered:  # look again if no other plan is as cheap as this bound
            heapq.heappush(heap, (max(lower, weights.value(plan, times[low])), low, high, True))
            continue
        if weights.value(plan, plan.bottleneck_s) < value:
            best, value = plan, weights.value(plan, plan.bottleneck_s)
        relaxed = weights.value(plan, times[low])
        lower = max(lower, relaxed)
        # Within the interval a plan of bottleneck t costs at least `relaxed` + (t - times[low]) x `rise`.
        rise = rate if weights.compute.any() else relaxed / times[low] if times[low] else 0.0
        if rise:
            beaten = times[low] + (value - relaxed) / rise
            high = min(high, int(np.searchsorted(times, beaten * (1 + _CLOSE), side="right")) - 1)
        if low < high and lower < value * (1 - _CLOSE):
            middle = (low + high) // 2
            heapq.heappush(heap, (lower, low, middle, False))
            heapq.heappush(heap, (max(lower, times[middle + 1] * rate), middle + 1, high, False))
    return best


def _intervals(problem: Problem, times: Floats, weights: _Weights) -> Iterator[tuple[int, int]]:
    """Indices in `times` of the first and last time of each interval. Short times are in narrow intervals: a search
    under a low bound is fast, and the best plan is usually near the lowest bound that any plan meets."""
    if not len(times):
        return
    if not weights.plan and not weights.device.any():  # the bottleneck does not matter
        yield 0, len(times) - 1
        return
    devices = len(problem.devices) if problem.counts is None else sum(problem.counts)
    level = max(times[0], np.array([device.use_s for device in problem.devices]).min(axis=0).sum() / devices)
    low = 0
    while low < len(times):
        high = max(low, int(np.searchsorted(times, level, side="right")) - 1)
        yield low, high
        low, level = high + 1, level * 1.25


def _planned(problem: Problem, stages: list[PlannedStage] | None) -> Plan | None:
    return None if stages is None else Plan.of(problem, stages)

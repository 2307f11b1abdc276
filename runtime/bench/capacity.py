"""What a contender can carry: the knee of its curve and the largest rate within the SLO, from stored measurements."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from stageline.runtime.bench.confidence import CONFIDENCE, interval
from stageline.runtime.bench.records import Load, Measurement, Slo

FAILING = 0.1
"""A load of which a larger share fails is beyond what the contender carries."""


@dataclass(frozen=True)
class Capacity:
    """What one contender can carry, in requests/s.

    `knee`: of the closed loops, the load with the largest throughput over mean latency, Kleinrock's power ("Power and
    deterministic rules of thumb", 1979). Where stages of fixed times take turns, that is the number of requests that
    just keeps the slowest one busy. None unless the closed loops beside it have at most twice and at least half as many
    at a time, so that it is known to a factor of two. `climbing`: no larger closed loop was measured, so the true knee
    may lie beyond. `peak_per_s`: the largest throughput of a closed loop.

    `best`: the largest rate that holds the SLO: of all requests, failed ones included, at least the SLO's share was
    answered within its bounds. `over_per_s`: the smallest larger rate that was measured and does not. None: no such
    measurement. `sure`: whether `best` holds with 95 % confidence; without one, whether `over_per_s` fails so.
    `over_alone`: a single request at a time surely does not hold the SLO, so no rate does.
    """

    contender: str
    knee: Load | None = None
    climbing: bool = False
    peak_per_s: float | None = None
    best: Load | None = None
    sure: bool = False
    over_per_s: float | None = None
    over_alone: bool = False


def capacities(measurements: Sequence[Measurement], slo: Slo) -> tuple[Capacity, ...]:
    """The capacity of each contender, in the order of the measurements."""
    names = dict.fromkeys(one.contender for one in measurements)
    return tuple(_capacity(name, [one for one in measurements if one.contender == name], slo) for name in names)


def _capacity(contender: str, measured: Sequence[Measurement], slo: Slo) -> Capacity:
    closed = sorted(
        (
            one
            for one in measured
            if one.load.scenario in ("SingleStream", "Concurrency") and _mean(one, "failed_share") <= FAILING
        ),
        key=lambda one: one.load.concurrency or 1,
    )
    knee = _knee(closed)
    peak = max((_mean(one, "requests_per_s") for one in closed), default=None)
    answers = {one.load.rate_per_s or 0.0: (one, *_held(one, slo)) for one in rates(measured)}
    low, over = bracket({rate: (holds, sure) for rate, (_, holds, sure) in answers.items()})
    best = None if low is None else answers[low][0]
    decisive = over if low is None else low
    sure = decisive is not None and answers[decisive][2]
    return Capacity(
        contender,
        None if knee is None else knee.load,
        knee is not None and knee is closed[-1],
        peak,
        None if best is None else best.load,
        sure,
        over,
        any(_held(one, slo) == (False, True) for one in closed if (one.load.concurrency or 1) == 1),
    )


def bracket(answers: Mapping[float, tuple[bool, bool]]) -> tuple[float | None, float | None]:
    """The largest rate that holds, and the smallest larger one that does not (None: no such rate). `answers`: of each
    rate, whether it holds, and whether that is sure.

    A rate does not count as holding if a smaller one fails, unless that failure is not sure and the rate surely holds:
    a single slow request fails a small sample.
    """
    low, failed, surely = None, False, False
    for rate, (holds, sure) in sorted(answers.items()):
        if holds and not surely and (sure or not failed):
            low = rate
        failed, surely = failed or not holds, surely or (sure and not holds)
    return low, min((rate for rate, (holds, _) in answers.items() if not holds and rate > (low or 0.0)), default=None)


def rates(measured: Iterable[Measurement]) -> list[Measurement]:
    """Those at a rate, with the share of requests that kept the SLO."""
    return [one for one in measured if one.load.rate_per_s is not None and "slo_share" in one.figures]


def held(shares: Sequence[float], requests: int, bound: float) -> tuple[bool, bool]:
    """Whether the mean share of requests that kept the SLO is at least `bound`, and whether that is sure.

    Sure is what the 95 % confidence interval over the repeats says (Student's t: requests of one repeat depend on each
    other, repeats do not). To be sure that a share is above the bound, the `requests` must also be so many that a
    contender just below it would hardly have all of them within: bound^requests <= 5 %.
    """
    above = settled(shares, bound)
    holds = float(np.mean(shares)) >= bound
    enough = bound**requests <= 1 - CONFIDENCE
    return holds, above is not None and above == holds and (enough or not holds)


def settled(values: Sequence[float], bound: float) -> bool | None:
    """Whether the mean of independent repeats is above `bound`, if its 95 % confidence interval says so; else None."""
    bounds = interval(values)
    if bounds is None or bounds[0] <= bound <= bounds[1]:
        return None
    return bounds[0] > bound


def _held(one: Measurement, slo: Slo) -> tuple[bool, bool]:
    share = one.figures.get("slo_share")
    return (True, False) if share is None else held(share.values, one.requests, slo.share)


def _knee(closed: Sequence[Measurement]) -> Measurement | None:
    """The knee of closed loops in ascending order, if its neighbours are near enough."""
    if len(closed) < 2:
        return None
    place = max(range(len(closed)), key=lambda at: _power(closed[at]))
    near = [one.load.concurrency or 1 for one in closed[max(0, place - 1) : place + 2]]
    return closed[place] if all(after <= 2 * before for before, after in pairwise(near)) else None


def _mean(one: Measurement, figure: str) -> float:
    found = one.figures.get(figure)
    return math.nan if found is None else found.mean


def _power(one: Measurement) -> float:
    latency = _mean(one, "latency_mean_s")
    return _mean(one, "requests_per_s") / latency if latency > 0 else -math.inf

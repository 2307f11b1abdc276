"""When to cut anew, and where: from measured windows of a running pipeline to advice, as plain data.

Every stage does the same steps, so their busy times in a window compare directly. The bottleneck has to exceed the mean
by a margin in several windows that follow each other. Then each stage's measured time over the time that the costs of
its uses tell makes its device's slowness (another process on its processor is a slower device), and the exact
partitioner finds the cut whose bottleneck is shortest on devices so slow. Costs need only be right in their shares, and
what is wrong with them counts as slowness of a device: it shrinks as the cut comes near the best.

It does not flap: the cut must promise a gain, a switch is followed by a rest, and rests double while switches follow
each other closely.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stageline.runtime.planning.partition import best_plan
from stageline.runtime.planning.problem import DeviceCost, Link, Problem, stage_time_s


@dataclass(frozen=True)
class PolicySettings:
    """`margin` and `least_gain` are shares: 0.1 is a tenth. A rest doubles where the switch before it was less than
    four rests ago, up to `longest_rest_s`."""

    window_s: float = 1.0
    windows: int = 3
    fewest_runs: int = 8  # of each stage in a window: with fewer it tells nothing
    margin: float = 0.1
    least_gain: float = 0.05
    rest_s: float = 10.0
    longest_rest_s: float = 300.0


@dataclass(frozen=True)
class Observation:
    """What the stages of `layers` blocks did for some time: `busy_s` and `runs` of each. `use_s` is what each use
    (prologue, blocks, epilogue) is told to take for the same work, in whatever unit, `later_stage_s` what every stage
    but the first takes besides."""

    layers: tuple[int, ...]
    busy_s: tuple[float, ...]
    runs: tuple[int, ...]
    use_s: tuple[float, ...]
    later_stage_s: float = 0.0

    @property
    def excess(self) -> float:
        """How much longer than the mean the bottleneck was busy, as a share of the mean."""
        return max(self.busy_s) * len(self.busy_s) / sum(self.busy_s) - 1


@dataclass(frozen=True)
class Advice:
    """A better cut. `gain` is the throughput it is told to give over that of now, less 1; `excess` is that of the
    windows, `slowness` of each stage's device, that of the fastest being 1."""

    now: tuple[int, ...]
    layers: tuple[int, ...]
    gain: float
    excess: float
    slowness: tuple[float, ...]

    def __str__(self) -> str:
        slow = [f"stage {n} {factor:.2f}" for n, factor in enumerate(self.slowness) if factor > 1.1]
        return (
            f"layers {_joined(self.layers)} instead of {_joined(self.now)} would give {1 + self.gain:.2f} x the "
            f"throughput: the bottleneck is busy {self.excess:.0%} longer than the mean"
            + (f"; times longer than told: {', '.join(slow)}" if slow else "")
        )


class Policy:
    """What was seen lately, and what follows. `observe` is called for each window in turn."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self._uneven: list[Observation] = []
        self._rest_s = settings.rest_s
        self._switched_at = -math.inf
        self._rests_until = -math.inf

    def observe(self, now_s: float, window: Observation) -> Advice | None:
        """Advice, where the latest windows call for another cut."""
        settings = self.settings
        if self._uneven and self._uneven[-1].layers != window.layers:
            self._uneven = []
        told = len(window.layers) > 1 and min(window.runs) >= settings.fewest_runs and sum(window.busy_s) > 0
        if not told or window.excess <= settings.margin or now_s < self._rests_until:
            self._uneven = []
            return None
        self._uneven.append(window)
        if len(self._uneven) < settings.windows:
            return None
        seen, self._uneven = summed(self._uneven), []
        advice = better_cut(seen)
        return advice if advice is not None and advice.gain >= settings.least_gain else None

    def switched(self, now_s: float) -> None:
        """It was switched to another cut, or tried in vain: rest."""
        settings = self.settings
        soon = now_s - self._switched_at < 4 * self._rest_s
        self._rest_s = min(settings.longest_rest_s, 2 * self._rest_s) if soon else settings.rest_s
        self._switched_at, self._rests_until, self._uneven = now_s, now_s + self._rest_s, []


def summed(windows: Sequence[Observation]) -> Observation:
    """Windows of one cut as one."""
    return Observation(
        windows[0].layers,
        tuple(map(sum, zip(*(w.busy_s for w in windows), strict=True))),
        tuple(map(sum, zip(*(w.runs for w in windows), strict=True))),
        tuple(map(sum, zip(*(w.use_s for w in windows), strict=True))),
        sum(w.later_stage_s for w in windows),
    )


def better_cut(window: Observation) -> Advice | None:
    """The best cut into as many stages, each on the device of the stage that it takes the place of; None where that is
    the cut of now."""
    ends = list(itertools.accumulate(window.layers))
    expected_s = [
        stage_time_s(window.use_s, end - count, end, window.later_stage_s)
        for count, end in zip(window.layers, ends, strict=True)
    ]
    factors = [busy / max(expected, 1e-12) for busy, expected in zip(window.busy_s, expected_s, strict=True)]
    devices = tuple(
        DeviceCost(
            f"stage {number}",
            tuple(factor * use for use in window.use_s),
            1.0,  # memory is not asked about: use_bytes are zero
            later_stage_s=factor * window.later_stage_s,
        )
        for number, factor in enumerate(factors)
    )
    count, blocks = len(devices), len(window.use_s) - 2
    problem = Problem(
        devices,
        links=tuple(tuple(Link() for _ in range(count)) for _ in range(count)),
        use_bytes=(0.0,) * (blocks + 2),
        cut_bytes=(0.0,) * (blocks + 1),
        stages=count,
    )
    plan = best_plan(problem)
    assert plan is not None
    layers = tuple(stage.end - stage.first for stage in plan.stages)
    if layers == window.layers:
        return None
    gain = max(window.busy_s) / plan.bottleneck_s - 1
    return Advice(window.layers, layers, gain, window.excess, tuple(factor / min(factors) for factor in factors))


def _joined(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))

"""From measured stages to the time of each use, for any micro-batch.

A stage's time is modelled as the sum of its uses plus a constant: one for the first stage (part of its prologue),
another for the rest. For each measured shape these unknowns are fitted to the measured ranges, none of them negative.
Small relative errors count by their squares, large ones linearly, so that a disturbed range hardly counts. Between
measured shapes the unknowns are interpolated linearly in batch, length and past, which is exact for costs per row, per
token, and per pair of tokens. So is the contention. Outside the measured shapes, and for a past with several new
tokens, the times are scaled by a roofline that is fitted to all measurements.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from stageline.models.errors import StagelineError
from stageline.runtime.bundle.manifest import Manifest, uses_of
from stageline.runtime.planning.cost import UseCost
from stageline.runtime.planning.device_kinds import Rates
from stageline.runtime.planning.problem import stage_time_s
from stageline.runtime.planning.profile import MachineProfile, Point
from stageline.runtime.workload import Shape

Floats = npt.NDArray[np.float64]
Key = tuple[int, int, int]
"""Batch, length and past."""
_ROUNDS, _SMALL_ERROR = 12, 0.03  # of reweighting; relative
Costs = Callable[[Shape], Sequence[UseCost]]
"""The cost of each use for a micro-batch."""


@dataclass(frozen=True)
class UseTimes:
    """Seconds of each use (prologue, blocks, epilogue), and what every stage except the first takes in addition.
    `contention` is the share by which a stage takes longer for each other stage that runs at the same time."""

    use_s: tuple[float, ...]
    later_stage_s: float
    contention: float = 0.0

    def stage_s(self, first: int, end: int) -> float:
        """Seconds of a stage of blocks `first` to `end` - 1."""
        return stage_time_s(self.use_s, first, end, self.later_stage_s)


class Timings:
    """The time of each use on the profile's machine with `threads` threads."""

    def __init__(self, profile: MachineProfile, manifest: Manifest, threads: int, costs: Costs):
        points = [point for point in profile.points if point.threads == threads]
        if not points:
            known = ", ".join(map(str, sorted({point.threads for point in profile.points})))
            raise StagelineError(f"the profile has no times with {threads} threads, only with {known}; profile again")
        self.costs, self.blocks = costs, manifest.blocks
        self.kinds = [use.part for use in manifest.uses[1:-1]]
        self.fits: dict[Key, UseTimes] = {}
        by_shape: dict[Key, list[Point]] = {}
        for point in points:
            by_shape.setdefault((point.batch, point.length, point.past), []).append(point)
        for shape, group in by_shape.items():
            self.fits[shape] = self._fitted(group)
        self.shares = {
            (one.batch, one.length, one.past): np.array([one.share])
            for one in profile.contention
            if one.threads == threads
        }
        self.rates = fitted_rates(points, costs)

    def of(self, shape: Shape) -> UseTimes:
        """The times for a micro-batch."""
        near = self._nearest(shape)
        inside = self._inside(near)
        if inside is None:
            raise StagelineError(f"the profile has no complete grid of shapes around {near}; profile again")
        if (near.sizes(), near.past) == (shape.sizes(), shape.past):
            return inside
        wanted, known = self.costs(shape), self.costs(near)
        scale = [
            self.rates.use_s(a) / self.rates.use_s(b) if self.rates.use_s(b) > 0 else 1.0
            for a, b in zip(wanted, known, strict=True)
        ]
        return replace(inside, use_s=tuple(s * time for s, time in zip(scale, inside.use_s, strict=True)))

    def _fitted(self, points: Sequence[Point]) -> UseTimes:
        """Fits the unknowns of one shape: prologue, later stages' constant, epilogue, each kind of block."""
        kinds = list(dict.fromkeys(self.kinds))
        rows = np.zeros((len(points), 3 + len(kinds)))
        for row, point in zip(rows, points, strict=True):
            row[0 if point.first == 0 else 1] = 1
            row[2] = point.end == self.blocks
            for block in range(point.first, point.end):
                row[3 + kinds.index(self.kinds[block])] += 1
        seconds = np.array([point.seconds for point in points])
        weights = np.ones(len(points))
        for _ in range(_ROUNDS):
            found = non_negative(weights[:, None] * rows / seconds[:, None], weights)
            weights = 1 / np.sqrt(np.maximum(np.abs(rows @ found / seconds - 1), _SMALL_ERROR))
        blocks = [float(found[3 + kinds.index(kind)]) for kind in self.kinds]
        return UseTimes((float(found[0]), *blocks, float(found[2])), float(found[1]))

    def _nearest(self, shape: Shape) -> Shape:
        """The shape, moved to the nearest one within the measured grid."""
        steps = [key for key in self.fits if key[1] == 1 and key[2] > 0]
        whole = [key for key in self.fits if key[2] == 0]
        grid = steps if steps and shape.length == 1 and shape.past > 0 else whole or steps
        low, high = np.min(grid, axis=0), np.max(grid, axis=0)
        batch, length, past = np.clip((shape.batch, shape.length, shape.past), low, high)
        return Shape(int(batch), int(length), int(past))

    def _inside(self, shape: Shape) -> UseTimes | None:
        """The times interpolated between the measured shapes around this one."""
        at = (shape.batch, shape.length, shape.past)

        def like(key: Key) -> bool:
            return (key[2] > 0) == (shape.past > 0)

        fits = {key: np.array([*fit.use_s, fit.later_stage_s]) for key, fit in self.fits.items() if like(key)}
        found = interpolated(fits, at)
        if found is None:
            return None
        share = interpolated({key: one for key, one in self.shares.items() if like(key)}, at)
        *use_s, later_s = map(float, found)
        return UseTimes(tuple(use_s), later_s, 0.0 if share is None else float(share[0]))


def interpolated(known: Mapping[Key, Floats], at: Key) -> Floats | None:
    """Multilinear interpolation between the nearest known points around `at`, constant outside of them. None if one of
    these points is not known."""
    if not known:
        return None
    axes = []
    for axis, value in enumerate(at):
        values = sorted({key[axis] for key in known})
        low = max((v for v in values if v <= value), default=values[0])
        high = min((v for v in values if v >= value), default=values[-1])
        share = (value - low) / (high - low) if high > low else 0.0
        axes.append(((low, 1 - share), (high, share)) if high > low else ((low, 1.0),))
    total: Floats = np.zeros(())
    for corner in itertools.product(*axes):
        batch, length, past = (value for value, _ in corner)
        values_there = known.get((batch, length, past))
        if values_there is None:
            return None
        total = total + math.prod(share for _, share in corner) * values_there
    return total


def fitted_rates(points: Sequence[Point], costs: Costs) -> Rates:
    """The roofline closest to the measurements: operations per second, bytes per second, and seconds per stage.

    It minimises the squared logarithms of the errors by trying rates ever closer to the best so far. A rate that no
    measurement depends on keeps its initial value.
    """
    work = []
    for point in points:
        uses = uses_of(costs(Shape(point.batch, point.length, point.past)), point.first, point.end)
        work.append([[use.flops, use.weight_read_bytes + use.cache_read_bytes] for use in uses])
    seconds = np.array([point.seconds for point in points])
    max_uses = max(map(len, work))
    table = np.array(
        [[*uses, *[[0, 0]] * (max_uses - len(uses))] for uses in work], float
    )  # [point, use, flops or bytes]

    def error(flops_per_s: float, bytes_per_s: float, overhead_s: float) -> float:
        expected = overhead_s + np.maximum(table[:, :, 0] / flops_per_s, table[:, :, 1] / bytes_per_s).sum(axis=1)
        strayed = np.log(np.array([flops_per_s, bytes_per_s]) / begun[:2])
        return float((np.log(expected / seconds) ** 2).sum() + 1e-6 * (strayed**2).sum())

    begun = best = (1e11, 1e10, float(seconds.min()) / 2)
    span = 1e3
    while span > 1.001:
        steps = [span**power for power in (-1, -0.5, 0, 0.5, 1)]
        a, b, c = best
        best = min(((a * i, b * j, c * k) for i, j, k in itertools.product(steps, repeat=3)), key=lambda r: error(*r))
        span = max(1.0, span**0.7)
    return Rates(*best)


def non_negative(rows: Floats, wanted: Floats) -> Floats:
    """The x >= 0 that minimises |`rows` @ x - `wanted`|, by coordinate descent."""
    square = rows.T @ rows + 1e-12 * np.eye(rows.shape[1]) * (rows**2).sum(axis=0).max()
    target = rows.T @ wanted
    scale = 1 / np.sqrt(np.diag(square).clip(1e-300))
    square, target = square * scale[:, None] * scale, target * scale
    x: Floats = np.zeros(len(target))
    for _ in range(5000):
        before = x.copy()
        for i in range(len(x)):
            if square[i, i] > 0:
                x[i] = max(0.0, x[i] + (target[i] - square[i] @ x) / square[i, i])
        if np.abs(x - before).max() <= 1e-12 * np.abs(x).max():
            break
    return np.asarray(x * scale)

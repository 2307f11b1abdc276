"""Shortest paths over cuts: the cheapest stages under a bound on each, for devices in order and for counted kinds.

Both searches fill a table cut by cut: an entry is the minimal cost of the blocks before a cut with the devices used for
them. The plan is read backwards from the full table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from stageline.models.errors import StagelineError
from stageline.runtime.planning.problem import PlannedStage, Problem

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Place = tuple[int | slice, ...]
_TABLE_LIMIT = 60_000_000  # entries of a table: 480 MB


@dataclass(frozen=True)
class Question:
    """No stage may take longer than `bound_s`. A stage costs `compute_weight[device]` x its compute time +
    `copy_weight` x its copy time + `device_weight[device]` for each of its replicas."""

    bound_s: float
    compute_weight: Floats
    copy_weight: float
    device_weight: Floats


class Tables:
    """Times and memory of every stage, as arrays over [device, first block, end]; infinite if impossible.

    `copy_s` is over [class of links, first block]; class 0 leads into the first stage and copies nothing.
    `forbidden` is a stage that no plan may have.
    """

    def __init__(self, problem: Problem, forbidden: PlannedStage | None):
        self.problem, self.forbidden = problem, forbidden
        n, devices = problem.blocks, problem.devices
        first, end = np.arange(n + 1)[:, None], np.arange(n + 1)[None]

        def stage_sums(uses: tuple[float, ...]) -> Floats:
            total = np.concatenate([[0.0], np.cumsum(uses[1:-1])])
            blocks = total[end] - total[first]
            return np.asarray(blocks + np.where(first == 0, uses[0], 0) + np.where(end == n, uses[-1], 0))

        def of_each(values: list[float]) -> Floats:
            return np.array(values)[:, None, None]

        possible = end > first
        if problem.layers is not None:
            possible = possible & np.array([[problem.allowed(i, j) for j in range(n + 1)] for i in range(n + 1)])
        whole = (first == 0) & (end == n)
        memory = stage_sums(problem.use_bytes) - np.where(whole, problem.tied_bytes, 0.0)
        self.excess_bytes: Floats = np.where(possible, memory, np.inf) + of_each(
            [device.workspace_bytes - device.memory_bytes for device in devices]
        )
        compute = np.stack([stage_sums(device.use_s) for device in devices])
        compute = compute + of_each([device.stage_s for device in devices])
        compute = compute + np.where(first > 0, of_each([device.later_stage_s for device in devices]), 0.0)
        self.compute_s: Floats = np.where(self.excess_bytes <= 0, compute, np.inf)
        self._quickest_s: Floats = self.compute_s.min(axis=0)
        links = sorted({link for row in problem.links for link in row if link is not None}, key=repr)
        copies = [[link.copy_s(problem.cut_bytes[i]) for i in range(n)] for link in links]
        self.copy_s: Floats = np.array([[0.0] * n, *copies])
        number = {link: place for place, link in enumerate(links, start=1)}
        self.link_class = np.array([[number[link] if link else -1 for link in row] for row in problem.links])

    def occupied_s(self, compute_s: Floats, copy_s: Floats, replicas: int) -> Floats:
        """Seconds from one micro-batch to the next in a stage with `replicas`."""
        longer: Floats = np.maximum(compute_s, copy_s) if self.problem.overlap else compute_s + copy_s
        return longer / replicas

    def last_end(self, first: int, bound_s: float, device: int | None = None) -> int:
        """The last end of a stage that starts at block `first` and computes for at most `bound_s`, on `device` or on
        any."""
        times = self._quickest_s[first] if device is None else self.compute_s[device, first]
        ends = np.flatnonzero(times <= bound_s)
        return int(ends[-1]) if len(ends) else first

    def stage_times(self) -> Floats:
        """Every time that a stage can take, ascending."""
        finite = np.isfinite(self.compute_s)
        starts, compute_s = np.nonzero(finite)[1], self.compute_s[finite]
        found = []
        for kind in range(len(self.copy_s)):
            at = starts == 0 if kind == 0 else starts > 0
            found += [
                self.occupied_s(compute_s[at], self.copy_s[kind, starts[at]], replicas)
                for replicas in range(1, self.problem.replicas + 1)
            ]
        return np.unique(np.concatenate(found))

    def cost(self, question: Question, link: int, first: Places, end: Places, device: Places, replicas: int) -> Floats:
        """Cost of stages of blocks `first` to `end` - 1 on `replicas` devices (all broadcast) behind a link of class
        `link`; infinite over the bound, or if the class cannot precede such a block."""
        compute_s, copy_s = self.compute_s[device, first, end], self.copy_s[link, first]
        able = (self.occupied_s(compute_s, copy_s, replicas) <= question.bound_s) & ((link == 0) == (first == 0))
        if self.forbidden is not None and self.forbidden.replicas == replicas:
            stage = self.forbidden
            able &= (device != stage.device) | (first != stage.first) | (end != stage.end)
        cost: Floats = question.compute_weight[device] * np.where(able, compute_s, 0.0)
        cost = cost + question.copy_weight * copy_s + question.device_weight[device] * replicas
        return np.where(able, cost, np.inf)


def _smallest(total: Floats) -> tuple[float, int, int]:
    """The smallest entry of a table, and its place."""
    row, column = divmod(int(total.argmin()), total.shape[1])
    return float(total[row, column]), row, column


class Chain:
    """Paths in which a stage on device a may be followed by one on device b where `follows`[a, b].

    The table is over [cut, stages, last device], where last device 0 is the start. The axis of stages has one entry if
    their number does not matter.
    """

    def __init__(self, tables: Tables, follows: npt.NDArray[np.bool_]):
        problem = tables.problem
        self.tables, self.count = tables, problem.stages
        self.blocks, self.devices = problem.blocks, np.arange(len(problem.devices))
        self.joins = np.zeros((len(tables.copy_s), len(self.devices) + 1, len(self.devices)), bool)  # [class, from, to]
        self.joins[0, 0] = True
        for link in range(1, len(tables.copy_s)):
            self.joins[link, 1:] = follows & (tables.link_class == link)

    @classmethod
    def in_order(cls, tables: Tables) -> "Chain":
        """Paths through the devices in their order."""
        places = np.arange(len(tables.problem.devices))
        return cls(tables, places[:, None] < places[None])

    def relaxed(self, question: Question) -> tuple[list[PlannedStage] | None, bool]:
        """`shortest`, and True: there is nothing to relax."""
        return self.shortest(question), True

    def shortest(self, question: Question) -> list[PlannedStage] | None:
        """The cheapest stages; None if there are none."""
        tables, n = self.tables, self.blocks
        value = np.full((n + 1, 1 if self.count is None else self.count + 1, len(self.devices) + 1), np.inf)
        value[0, 0, 0] = 0.0
        for i in range(n):
            stop = tables.last_end(i, question.bound_s) + 1
            ends = np.arange(i + 1, stop)[:, None]
            reached = value[i + 1 : stop, :, 1:] if self.count is None else value[i + 1 : stop, 1:, 1:]
            arrive = value[i] if self.count is None else value[i, :-1]
            for link in (0,) if i == 0 else range(1, len(tables.copy_s)):
                cost = tables.cost(question, link, np.array(i), ends, self.devices, 1)
                joined = np.where(self.joins[link], arrive[:, :, None], np.inf).min(axis=1)
                np.minimum(reached, joined + cost[:, None], out=reached)
        return self._trace(question, value)

    def _trace(self, question: Question, value: Floats) -> list[PlannedStage] | None:
        level, end = value.shape[1] - 1, self.blocks
        last = int(value[end, level].argmin())
        if np.isinf(value[end, level, last]):
            return None
        stages: list[PlannedStage] = []
        while last:
            level, device, firsts = max(level - 1, 0), last - 1, np.arange(end)
            found = []
            for link in range(len(self.tables.copy_s)):
                cost = self.tables.cost(question, link, firsts, np.array(end), np.array(device), 1)
                total = np.where(self.joins[link, :, device], value[:end, level], np.inf) + cost[:, None]
                found.append(_smallest(total))
            _, first, origin = min(found)
            stages.append(PlannedStage(device, first, end))
            end, last = first, origin
        return stages[::-1]


class BoundedPaths:
    """Paths that use at most a number of devices of each kind.

    Usually the cheapest path uses fewer devices than there are. So it is searched first as a chain in which any kind
    may follow any other without limit. If it uses too many of a kind, it is still a lower bound.

    The table is over [cut, last kind, used of kind 0, used of kind 1, ...], where last kind 0 is the start.
    """

    def __init__(self, tables: Tables):
        problem = tables.problem
        assert problem.counts is not None
        self.tables, self.blocks, self.count, self.counts = tables, problem.blocks, problem.stages, problem.counts
        limit = problem.blocks * problem.replicas
        self.shape = (len(self.counts) + 1, *(min(count, limit) + 1 for count in self.counts))
        entries = (self.blocks + 1) * math.prod(self.shape)
        if entries > _TABLE_LIMIT:
            raise StagelineError(
                f"{sum(self.counts)} devices of {len(self.counts)} kinds without an order need a table of {entries:,} "
                f"entries, more than {_TABLE_LIMIT:,}; put them in order, or use fewer kinds"
            )
        self.joins = np.zeros((len(tables.copy_s), len(self.counts) + 1, len(self.counts)), bool)  # [class, from, to]
        self.joins[0, 0] = True
        for link in range(1, len(tables.copy_s)):
            self.joins[link, 1:] = tables.link_class == link
        kinds = len(self.counts)
        self.endless = Chain(tables, np.ones((kinds, kinds), bool)) if problem.replicas == 1 else None

    def relaxed(self, question: Question) -> tuple[list[PlannedStage] | None, bool]:
        """The cheapest stages with unlimited devices, and whether there are that many; those of `shortest` cost no
        less."""
        if self.endless is None:
            return self.shortest(question), True
        stages = self.endless.shortest(question)
        used = [sum(stage.device == kind for stage in stages or []) for kind in range(len(self.counts))]
        return stages, all(count <= limit for count, limit in zip(used, self.counts, strict=True))

    def shortest(self, question: Question) -> list[PlannedStage] | None:
        """The cheapest stages; None if there are none."""
        tables = self.tables
        value = np.full((self.blocks + 1, *self.shape), np.inf)
        value[(0,) * value.ndim] = 0.0
        for i in range(self.blocks):
            for kind, replicas in self._moves():
                stop = tables.last_end(i, question.bound_s * replicas, kind) + 1
                ends = np.arange(i + 1, stop)
                for link in range(len(tables.copy_s)):
                    lasts = np.flatnonzero(self.joins[link, :, kind])
                    if (link == 0) != (i == 0) or not len(lasts):
                        continue
                    cost = tables.cost(question, link, np.array(i), ends, np.array(kind), replicas)
                    joined = value[i, lasts].min(axis=0)[self._used(kind, slice(None, -replicas))]
                    reached = value[i + 1 : stop, kind + 1][self._used(kind, slice(replicas, None), slice(None))]
                    np.minimum(reached, joined + cost.reshape(-1, *[1] * joined.ndim), out=reached)
        return self._trace(question, value)

    def _moves(self) -> Iterator[tuple[int, int]]:
        """Every kind with every number of its devices that may share a stage."""
        for kind, size in enumerate(self.shape[1:]):
            for replicas in range(1, min(self.tables.problem.replicas, size - 1) + 1):
                yield kind, replicas

    def _used(self, kind: int, part: slice, *ahead: slice) -> Place:
        """An index: a slice of the axis of `kind`, all of the others, after the axes `ahead`."""
        return *ahead, *(part if axis == kind else slice(None) for axis in range(len(self.counts)))

    def _trace(self, question: Question, value: Floats) -> list[PlannedStage] | None:
        end, final = self.blocks, value[-1]
        if self.count is not None:
            final = np.where(np.indices(self.shape[1:]).sum(axis=0) == self.count, final, np.inf)
        last, *used = (int(place) for place in np.unravel_index(int(final.argmin()), final.shape))
        if np.isinf(final[(last, *used)]):
            return None
        stages: list[PlannedStage] = []
        while last:
            kind, firsts = last - 1, np.arange(end)
            found = []
            for replicas in [shared for of, shared in self._moves() if of == kind and shared <= used[kind]]:
                before = tuple(count - replicas * (axis == kind) for axis, count in enumerate(used))
                at: Place = (slice(0, end), slice(None), *before)
                for link in range(len(self.tables.copy_s)):
                    cost = self.tables.cost(question, link, firsts, np.array(end), np.array(kind), replicas)
                    total = np.where(self.joins[link, :, kind], value[at], np.inf) + cost[:, None]
                    found.append((*_smallest(total), before, replicas))
            _, first, last, before, replicas = min(found)
            stages.append(PlannedStage(kind, first, end, replicas))
            end, used = first, list(before)
        return stages[::-1]

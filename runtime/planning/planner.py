"""Plans for a bundle: costs and devices made into a problem, solved, and told with its reasons."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import get_args

from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.planning.catalogue import Rates
from stageline.runtime.planning.cluster import Cluster, Kind
from stageline.runtime.planning.cost import UseCost, cut_values, use_costs, values_bytes
from stageline.runtime.planning.partition import best_plan, runner_up
from stageline.runtime.planning.problem import DeviceCost, Link, Objective, Plan, PlannedStage, Problem
from stageline.runtime.planning.profile import MachineProfile, command
from stageline.runtime.planning.shortage import smallest_shortage
from stageline.runtime.planning.simulate import Setting, SimulatedStage
from stageline.runtime.planning.timings import Timings
from stageline.runtime.workload import Shape, Workload

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}
_MOST_STAGES = 16  # that are tried one by one for a model with caches
_LENGTH_STEP, _PAST_STEP = 8, 64  # tokens: times of simulated steps are told for multiples of these


@dataclass(frozen=True)
class Answer:
    """A plan with what it gives. `cycle_s` is the time between a micro-batch and its next turn; with caches that is the
    time for a token. Cost is for a million tokens, energy for one."""

    problem: Problem
    plan: Plan
    shape: Shape
    tokens_per_cycle: int
    cycle_s: float
    price_per_million: float
    energy_j_per_token: float

    @property
    def tokens_per_s(self) -> float:
        """In the steady state."""
        return self.tokens_per_cycle / self.cycle_s

    def value(self, objective: Objective) -> float:
        """What the objective makes smallest, for a token: to compare plans of different numbers of stages."""
        return {
            "throughput": self.cycle_s / self.tokens_per_cycle,
            "latency": self.cycle_s if self.shape.past else self.plan.latency_s,
            "cost": self.price_per_million,
            "energy": self.energy_j_per_token,
        }[objective]


@dataclass(frozen=True)
class Planner:
    """Plans for `bundle` on `cluster` in `dtype`; `profile` tells the times on this machine's processors.

    Where `cluster` has such, int8 and int4 count as the engine on processors holds them: the matrices of products, with
    scales and zero points; all else stays in float32.
    """

    bundle: Bundle
    cluster: Cluster
    load: Workload
    dtype: str = "float32"
    overlap: bool = True
    profile: MachineProfile | None = None
    layers: tuple[int, ...] | None = None
    replicas: int = 1

    @cached_property
    def costs(self) -> Callable[[Shape], tuple[UseCost, ...]]:
        """The cost of each use for a micro-batch, remembered; weights are counted in the planner's dtype."""
        manifest, parts, weights = self.bundle.manifest, self.bundle.parts(), self._weights
        if weights is not None:
            return cache(lambda shape: tuple(use_costs(manifest, self.bundle.tensors, parts, shape, weights=weights)))
        cache_itemsize = 2 if weights_of(self.dtype) else 4

        @cache
        def of(shape: Shape) -> tuple[UseCost, ...]:
            return tuple(
                replace(
                    cost,
                    weight_read_bytes=round(cost.weight_read_bytes * self._scale(cost)),
                    parameter_bytes=round(cost.parameter_bytes * self._scale(cost)),
                )
                for cost in use_costs(manifest, self.bundle.tensors, parts, shape, cache_itemsize)
            )

        return of

    @property
    def _weights(self) -> WeightDtype | None:
        return weights_of(self.dtype) if self.cluster.local else None

    def _scale(self, cost: UseCost) -> float:
        return _ITEMSIZE[self.dtype] * cost.parameters / cost.parameter_bytes if cost.parameter_bytes else 1.0

    @cached_property
    def _timings(self) -> Callable[[int], Timings]:
        if self.profile is None:
            raise StagelineError(
                "times on this machine's processors are not known; run: "
                f"{command(self.bundle.path, weights_of(self.dtype))}"
            )
        profile = self.profile
        return cache(lambda threads: Timings(profile, self.bundle.manifest, threads, self.costs))

    def rates(self, kind: Kind) -> Rates:
        """The roofline of a device: of its published figures, or of what the profile measured."""
        return self._timings(kind.threads).rates if kind.device is None else kind.device.rates(self.dtype)

    def problem(self, shape: Shape, stages: int | None = None, beside: int = 0) -> Problem:
        """The problem for a micro-batch and, where it is given, a number of stages. On this machine each of them runs
        beside so many others, with which it shares the memory."""
        manifest, costs = self.bundle.manifest, self.costs(shape)
        cached_tokens = self.load.slots * self.load.capacity if manifest.cached else 0
        first, last = manifest.uses[0], manifest.uses[-1]
        tied = set(first.weights.values()) & set(last.weights.values())
        if self._weights is not None:  # the table that is looked up stays beside the quantised matrix
            tied = set()
        return Problem(
            devices=tuple(self._device(kind, shape, costs, beside) for kind in self.cluster.kinds),
            links=self.cluster.links,
            use_bytes=tuple(float(c.parameter_bytes + c.cache_token_bytes * cached_tokens) for c in costs),
            cut_bytes=tuple(float(values_bytes(values, shape)) for values in self._cut_values),
            counts=None if self.cluster.ordered else tuple(kind.count for kind in self.cluster.kinds),
            tied_bytes=sum(self.bundle.tensors[name].size_bytes for name in tied) * self._scale(costs[0]),
            overlap=self.overlap,
            layers=self.layers,
            stages=stages,
            replicas=self.replicas if stages is None else 1,
        )

    @cached_property
    def _cut_values(self) -> list[tuple[TensorSpec, ...]]:
        return cut_values(self.bundle.manifest, self.bundle.parts())

    def _device(self, kind: Kind, shape: Shape, costs: Sequence[UseCost], beside: int) -> DeviceCost:
        workspace = float(max(cost.activation_bytes for cost in costs))
        if kind.device is None:
            local = sum(other.count for other in self.cluster.kinds if other.device is None)
            times = self._timings(kind.threads).of(shape)
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local
            longer = 1 + times.contention * beside
            return DeviceCost(
                kind.name,
                tuple(use_s * longer for use_s in times.use_s),
                memory,
                later_stage_s=times.later_stage_s * longer,
                workspace_bytes=workspace,
            )
        device, rates = kind.device, kind.device.rates(self.dtype)
        return DeviceCost(
            kind.name,
            tuple(map(rates.use_s, costs)),
            device.memory_gb * 1e9,
            stage_s=rates.overhead_s,
            workspace_bytes=workspace,
            price_per_h=device.price_per_h,
            busy_w=device.busy_w,
            idle_w=device.idle_w,
        )

    def best(self, objective: Objective) -> Answer:
        """The best plan. StagelineError where none fits: what is short, by how much, and what would fit."""
        self._check(objective)
        found = [answer for answer in self._answers(objective) if answer is not None]
        if not found:
            raise StagelineError(self._why_nothing_fits())
        return min(found, key=lambda answer: answer.value(objective))

    def cut(self, layers: Sequence[int]) -> Answer:
        """What stages of so many blocks give, each on a device of the first kind, whether they fit or not."""
        shape = self.load.shape(self.bundle.manifest.cached, len(layers))
        problem = self.problem(shape, beside=self._beside(len(layers)))
        ends = list(itertools.accumulate(layers))
        stages = [PlannedStage(0, first, end) for first, end in zip((0, *ends), ends, strict=False)]
        return self._answer(problem, Plan.of(problem, stages), shape)

    def second(self, objective: Objective, best: Answer) -> Answer | None:
        """The best plan with another cut or another device."""
        other = runner_up(best.problem, objective, best.plan)
        found = [self._answer(best.problem, other, best.shape)] if other is not None else []
        found += [
            answer
            for answer in self._answers(objective)
            if answer is not None and answer.plan.stages != best.plan.stages
        ]
        return min(found, key=lambda answer: answer.value(objective), default=None)

    def _answers(self, objective: Objective) -> Iterator[Answer | None]:
        """The best plan for each number of stages, where that decides the micro-batch or how stages slow each other
        down; else the best plan."""
        cached = self.bundle.manifest.cached
        devices = sum(kind.count for kind in self.cluster.kinds)
        local = sum(kind.count for kind in self.cluster.kinds if kind.device is None)
        most = min(devices, self.bundle.manifest.blocks, self.load.slots if cached else devices, _MOST_STAGES)
        counts: Sequence[int | None] = range(1, most + 1) if self.layers is None else [len(self.layers)]
        if not cached and (local < 2 or self.replicas > 1):
            counts = [None]
        for stages in counts:
            shape = self.load.shape(cached, stages)
            alone = objective == "latency" and not cached  # a micro-batch on its way, and no other
            problem = self.problem(shape, stages, 0 if alone else self._beside(stages or local))
            plan = best_plan(problem, objective)
            yield None if plan is None else self._answer(problem, plan, shape)

    def _beside(self, stages: int) -> int:
        """How many of so many stages run on this machine's processors while one of them does."""
        local = sum(kind.count for kind in self.cluster.kinds if kind.device is None)
        return max(0, min(local, stages) - 1)

    def _answer(self, problem: Problem, plan: Plan, shape: Shape) -> Answer:
        if shape.past:  # as many groups are under way as there are stages
            groups = len(plan.stages)
            cycle_s = max(plan.latency_s, groups * plan.bottleneck_s)
            tokens = self.load.slots
        else:
            groups, cycle_s, tokens = 1, plan.bottleneck_s, shape.batch * shape.length
        return Answer(
            problem,
            plan,
            shape,
            tokens,
            cycle_s,
            plan.price_per_h / 3600 * cycle_s / tokens * 1e6,
            plan.energy_j * groups / tokens,
        )

    def _check(self, objective: Objective) -> None:
        if objective in ("cost", "energy") and self.cluster.local:
            raise StagelineError(
                f"the objective {objective} needs prices and power, which are not known of this machine's processors; "
                "describe them in a cluster file"
            )

    def setting(self, answer: Answer) -> Setting:
        """The plan as a pipeline to simulate, for micro-batches of any shape."""
        stages = []
        for number, stage in enumerate(answer.plan.stages):
            cost = answer.problem.devices[stage.device]
            link = answer.problem.links[answer.plan.stages[number - 1].device][stage.device] if number else None
            stages.append(
                SimulatedStage(
                    self._stage_time(stage.device, stage.first, stage.end),
                    number,
                    None if link is None else self._copy_time(link, stage.first),
                    f"into stage {number}",
                    self._contention(stage.device),
                    busy_w=cost.busy_w,
                    idle_w=cost.idle_w,
                    price_per_h=cost.price_per_h,
                )
            )
        host = (self.profile.host_step_s, self.profile.host_row_s) if self.profile is not None else ()
        return Setting(tuple(stages), self.overlap, *host)

    def _copy_time(self, link: Link, first: int) -> Callable[[Shape], float]:
        values = self._cut_values[first]
        return cache(lambda shape: link.copy_s(values_bytes(values, shape)))

    def _stage_time(self, device: int, first: int, end: int) -> Callable[[Shape], float]:
        kind = self.cluster.kinds[device]

        @cache
        def of(shape: Shape) -> float:
            cost = self._device(kind, shape, self.costs(shape), 0)
            return replace(self._bare, devices=(cost,), links=((None,),), counts=None).compute_s(0, first, end)

        return lambda shape: of(_rounded(shape))

    def _contention(self, device: int) -> Callable[[Shape], float] | None:
        kind = self.cluster.kinds[device]
        if kind.device is not None:
            return None
        timings = self._timings(kind.threads)
        of = cache(lambda shape: timings.of(shape).contention)
        return lambda shape: of(_rounded(shape))

    @cached_property
    def _bare(self) -> Problem:
        return replace(self.problem(self.load.shape(self.bundle.manifest.cached, 1)), layers=None, replicas=1)

    def _fits(self) -> bool:
        return any(answer is not None for answer in self._answers("latency"))

    def _why_nothing_fits(self) -> str:
        stages = len(self.layers) if self.layers is not None else None
        problem = self.problem(self.load.shape(self.bundle.manifest.cached, stages))
        short = smallest_shortage(problem)
        if short is None:
            return "no plan exists: no chain of links joins enough devices for the wanted stages"
        stage = short.stage
        device = problem.devices[stage.device]
        needed = problem.stage_bytes(stage.device, stage.first, stage.end)
        told = (
            f"no plan fits: at the best cut blocks {stage.first} to {stage.end - 1} need {needed / 1e9:.3g} GB on "
            f"{device.name}, which has {device.memory_bytes / 1e9:.3g} GB: short by {short.short_bytes / 1e9:.3g} GB"
        )
        ways = list(self._ways_out())
        return f"{told}; what fits: {', or '.join(ways)}" if ways else told

    def _ways_out(self) -> Iterator[str]:
        """The smallest change of each kind with which a plan fits."""
        load = self.load
        if self.bundle.manifest.cached:
            slots = _largest(lambda k: self._with(replace(load, slots=k))._fits(), load.slots - 1)
            capacity = 64 * _largest(
                lambda k: self._with(replace(load, capacity=64 * k))._fits(), (load.capacity - 1) // 64
            )
            yield from [f"--slots {slots} instead of {load.slots}"] if slots else []
            yield from [f"--capacity {capacity} instead of {load.capacity}"] if capacity else []
        for place, kind in enumerate(self.cluster.kinds):
            if kind.device is None or self.cluster.ordered:
                continue
            for more in (1, 2, 4, 8):
                kinds = list(self.cluster.kinds)
                kinds[place] = replace(kind, names=(*kind.names, *(f"{kind.name}:+{n}" for n in range(more))))
                if replace(self, cluster=replace(self.cluster, kinds=tuple(kinds)))._fits():
                    yield f"{kind.count + more} x {kind.name} instead of {kind.count}"
                    break

    def _with(self, load: Workload) -> "Planner":
        return replace(self, load=load)


def weights_of(dtype: str) -> WeightDtype | None:
    """What an engine is to quantise weights to so that they are of `dtype`; None: nothing."""
    return next((known for known in get_args(WeightDtype) if known == dtype), None)


def _rounded(shape: Shape) -> Shape:
    """The shape with past, and the length of a chunk, rounded up: few shapes are told apart."""
    length = shape.length if shape.length == 1 else -(-shape.length // _LENGTH_STEP) * _LENGTH_STEP
    return replace(shape, length=length, past=-(-shape.past // _PAST_STEP) * _PAST_STEP)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 where none does; what fits, fits for every smaller one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def device_names(cluster: Cluster, plan: Plan) -> list[list[str]]:
    """The devices of each stage by name, each used once."""
    free = {number: itertools.chain(kind.names) for number, kind in enumerate(cluster.kinds)}
    return [[next(free[stage.device]) for _ in range(stage.replicas)] for stage in plan.stages]

"""Plans for a bundle: turns costs and devices into a problem, solves it, and explains the answer."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import get_args

from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.planning.cluster import Cluster, Kind
from stageline.runtime.planning.cores import Cores
from stageline.runtime.planning.cost import UseCost, cut_values, use_costs, values_bytes
from stageline.runtime.planning.device_kinds import Rates
from stageline.runtime.planning.memory_shortage import smallest_shortage
from stageline.runtime.planning.partition import best_plan, runner_up
from stageline.runtime.planning.problem import DeviceCost, Link, Objective, Plan, PlannedStage, Problem
from stageline.runtime.planning.profile import MachineProfile, command
from stageline.runtime.planning.simulate import Setting, SimulatedStage
from stageline.runtime.planning.timings import Timings
from stageline.runtime.workload import Shape, Workload

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}
_MAX_STAGES = 16  # tried one by one for a model with caches
_LENGTH_STEP, _PAST_STEP = 8, 64  # tokens: simulated steps are rounded up to multiples of these


@dataclass(frozen=True)
class Answer:
    """A plan and its performance. `cycle_s` is the time between two turns of a micro-batch; with caches that is the
    time per token. The price is per million tokens, the energy per token."""

    problem: Problem
    plan: Plan
    shape: Shape
    tokens_per_cycle: int
    cycle_s: float
    price_per_million: float
    energy_j_per_token: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput in the steady state."""
        return self.tokens_per_cycle / self.cycle_s

    def value(self, objective: Objective) -> float:
        """What the objective minimises, per token, so that plans of different numbers of stages compare."""
        return {
            "throughput": self.cycle_s / self.tokens_per_cycle,
            "latency": self.cycle_s if self.shape.past else self.plan.latency_s,
            "cost": self.price_per_million,
            "energy": self.energy_j_per_token,
        }[objective]


@dataclass(frozen=True)
class Planner:
    """Plans for `bundle` on `cluster` in `dtype`. `profile` has the measured times of this machine's CPU.

    If `cluster` includes this CPU, int8 and int4 count as its engine holds them: matrices of products quantised, with
    scales and zero points; everything else in float32.
    """

    bundle: Bundle
    cluster: Cluster
    workload: Workload
    dtype: str = "float32"
    overlap: bool = True
    profile: MachineProfile | None = None
    layers: tuple[int, ...] | None = None
    replicas: int = 1

    @cached_property
    def costs(self) -> Callable[[Shape], tuple[UseCost, ...]]:
        """The cost of each use for a micro-batch, cached; weights count in the planner's dtype."""
        manifest, parts, quantise = self.bundle.manifest, self.bundle.parts(), self._quantise
        if quantise is not None:
            return cache(lambda shape: tuple(use_costs(manifest, self.bundle.tensors, parts, shape, quantise=quantise)))
        cached, held = 2 if quantise_for(self.dtype) else 4, _ITEMSIZE[self.dtype]
        packed: WeightDtype | None = None if self._here else "float32"
        return cache(lambda shape: tuple(use_costs(manifest, self.bundle.tensors, parts, shape, cached, packed, held)))

    @property
    def _here(self) -> bool:
        return self.cluster.local or any(isinstance(kind.device, Cores) for kind in self.cluster.kinds)

    @property
    def _quantise(self) -> WeightDtype | None:
        return quantise_for(self.dtype) if self._here else None

    @cached_property
    def _timings(self) -> Callable[[int], Timings]:
        if self.profile is None:
            raise StagelineError(
                "times on this machine's cores are not known; run: "
                f"{command(self.bundle.path, quantise_for(self.dtype))}"
            )
        profile = self.profile
        return cache(lambda threads: Timings(profile, self.bundle.manifest, threads, self.costs))

    def rates(self, kind: Kind) -> Rates:
        """The roofline of a device, from published figures or from the profile."""
        return self._timings(kind.threads).rates if kind.device is None else kind.device.rates(self.dtype)

    def problem(self, shape: Shape, stages: int | None = None, beside: int = 0) -> Problem:
        """The problem for a micro-batch and, if not None, a number of stages. On this machine each stage shares memory
        bandwidth with `beside` others that run at the same time."""
        manifest, costs = self.bundle.manifest, self.costs(shape)
        cached_tokens = self.workload.slots * self.workload.capacity if manifest.cached else 0
        first, last = manifest.uses[0], manifest.uses[-1]
        tied = set(first.weights.values()) & set(last.weights.values())
        if self._quantise is not None or (manifest.packed and self._here):  # the table is beside the matrix
            tied = set()
        return Problem(
            devices=tuple(self._device(kind, shape, costs, beside) for kind in self.cluster.kinds),
            links=self.cluster.links,
            use_bytes=tuple(float(c.parameter_bytes + c.cache_token_bytes * cached_tokens) for c in costs),
            cut_bytes=tuple(float(values_bytes(values, shape)) for values in self._cut_values),
            counts=None if self.cluster.ordered else tuple(kind.count for kind in self.cluster.kinds),
            tied_bytes=_ITEMSIZE[self.dtype] * sum(math.prod(self.bundle.tensors[name].shape) for name in tied),
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
        """The best plan. StagelineError if none fits: what lacks memory, how much, and what would fit."""
        self._check(objective)
        found = [answer for answer in self._answers(objective) if answer is not None]
        if not found:
            raise StagelineError(self._why_nothing_fits())
        return min(found, key=lambda answer: answer.value(objective))

    def cut(self, layers: Sequence[int]) -> Answer:
        """The answer for stages of `layers` blocks, each on a device of the first kind, whether they fit or not."""
        shape = self.workload.shape(self.bundle.manifest.cached, len(layers))
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
        """The best plan for each number of stages, if that number decides the micro-batch or the contention; else the
        best plan."""
        cached = self.bundle.manifest.cached
        devices = sum(kind.count for kind in self.cluster.kinds)
        local = sum(kind.count for kind in self.cluster.kinds if kind.device is None)
        max_stages = min(devices, self.bundle.manifest.blocks, self.workload.slots if cached else devices, _MAX_STAGES)
        counts: Sequence[int | None] = range(1, max_stages + 1) if self.layers is None else [len(self.layers)]
        if not cached and (local < 2 or self.replicas > 1):
            counts = [None]
        for stages in counts:
            shape = self.workload.shape(cached, stages)
            alone = objective == "latency" and not cached  # one micro-batch at a time
            problem = self.problem(shape, stages, 0 if alone else self._beside(stages or local))
            plan = best_plan(problem, objective)
            yield None if plan is None else self._answer(problem, plan, shape)

    def _beside(self, stages: int) -> int:
        """How many others of `stages` stages run on this machine's cores while one of them does."""
        local = sum(kind.count for kind in self.cluster.kinds if kind.device is None)
        return max(0, min(local, stages) - 1)

    def _answer(self, problem: Problem, plan: Plan, shape: Shape) -> Answer:
        if shape.past:  # there is one group per stage
            groups = len(plan.stages)
            cycle_s = max(plan.latency_s, groups * plan.bottleneck_s)
            tokens = self.workload.slots
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
                f"the objective {objective} needs prices and power, which are not known for this machine's CPU; "
                "describe them in a cluster file"
            )

    def setting(self, answer: Answer) -> Setting:
        """The plan as a pipeline that can be simulated, for micro-batches of any shape."""
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
        step_s, row_s = (self.profile.host_step_s, self.profile.host_row_s) if self.profile is not None else (0.0, 0.0)
        return Setting(tuple(stages), self.overlap, step_s, row_s, packs=self.cluster.local)

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
        return replace(self.problem(self.workload.shape(self.bundle.manifest.cached, 1)), layers=None, replicas=1)

    def _fits(self) -> bool:
        return any(answer is not None for answer in self._answers("latency"))

    def _why_nothing_fits(self) -> str:
        stages = len(self.layers) if self.layers is not None else None
        problem = self.problem(self.workload.shape(self.bundle.manifest.cached, stages))
        short = smallest_shortage(problem)
        if short is None:
            return "no plan exists: no chain of links joins enough devices for these stages"
        stage = short.stage
        device = problem.devices[stage.device]
        needed = problem.stage_bytes(stage.device, stage.first, stage.end)
        message = (
            f"no plan fits: at the best cut blocks {stage.first} to {stage.end - 1} need {needed / 1e9:.3g} GB on "
            f"{device.name}, which has {device.memory_bytes / 1e9:.3g} GB: short by {short.short_bytes / 1e9:.3g} GB"
        )
        ways = list(self._ways_out())
        return f"{message}; what fits: {', or '.join(ways)}" if ways else message

    def _ways_out(self) -> Iterator[str]:
        """The smallest change of each option with which a plan fits."""
        workload = self.workload
        if self.bundle.manifest.cached:
            slots = _largest(lambda k: self._with(replace(workload, slots=k))._fits(), workload.slots - 1)
            capacity = 64 * _largest(
                lambda k: self._with(replace(workload, capacity=64 * k))._fits(), (workload.capacity - 1) // 64
            )
            yield from [f"--slots {slots} instead of {workload.slots}"] if slots else []
            yield from [f"--capacity {capacity} instead of {workload.capacity}"] if capacity else []
        for place, kind in enumerate(self.cluster.kinds):
            if kind.device is None or self.cluster.ordered:
                continue
            for more in (1, 2, 4, 8):
                kinds = list(self.cluster.kinds)
                kinds[place] = replace(kind, names=(*kind.names, *(f"{kind.name}:+{n}" for n in range(more))))
                if replace(self, cluster=replace(self.cluster, kinds=tuple(kinds)))._fits():
                    yield f"{kind.count + more} x {kind.name} instead of {kind.count}"
                    break

    def _with(self, workload: Workload) -> "Planner":
        return replace(self, workload=workload)


def quantise_for(dtype: str) -> WeightDtype | None:
    """The `quantise` option that makes an engine hold weights in `dtype`; None if it needs none."""
    return next((known for known in get_args(WeightDtype) if known == dtype != "float32"), None)


def _rounded(shape: Shape) -> Shape:
    """The shape with its past and its chunk length rounded up, so that few different shapes are computed."""
    length = shape.length if shape.length == 1 else -(-shape.length // _LENGTH_STEP) * _LENGTH_STEP
    return replace(shape, length=length, past=-(-shape.past // _PAST_STEP) * _PAST_STEP)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 if none does. If a number fits, so does every smaller one."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def device_names(cluster: Cluster, plan: Plan) -> list[list[str]]:
    """Names of each stage's devices; each device is used once."""
    free = {number: itertools.chain(kind.names) for number, kind in enumerate(cluster.kinds)}
    return [[next(free[stage.device]) for _ in range(stage.replicas)] for stage in plan.stages]

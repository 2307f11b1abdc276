"""The planner's problem (costs of the model's uses on each device, links, memory, pinned layers) and its answer."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stageline.models.errors import StagelineError
from stageline.runtime.bundle.manifest import uses_of

Objective = Literal["throughput", "latency", "cost", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency", "cost", "energy")


@dataclass(frozen=True)
class DeviceCost:
    """The model on one kind of device: seconds of each use (prologue, blocks, epilogue) for a micro-batch.

    `stage_s` is added for each stage, `later_stage_s` for each stage except the first (shared values that it
    recomputes). `memory_bytes` is what the device has, `workspace_bytes` what a stage needs in addition to its uses.
    """

    name: str
    use_s: tuple[float, ...]
    memory_bytes: float
    stage_s: float = 0.0
    later_stage_s: float = 0.0
    workspace_bytes: float = 0.0
    price_per_h: float = 0.0
    busy_w: float = 0.0
    idle_w: float = 0.0


@dataclass(frozen=True)
class Link:
    """A connection that carries micro-batches from one device to another."""

    bandwidth_bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def copy_s(self, count_bytes: float) -> float:
        """Seconds to copy `count_bytes`."""
        return self.latency_s + count_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Problem:
    """A model of `len(use_bytes) - 2` blocks and the devices to cut it for.

    `devices` are in order: a stage's device comes after that of the stage before, and any may be left out. With
    `counts` there is no order: there are `counts[k]` devices of the kind `devices[k]`. `links[a][b]` leads from device
    (or kind) a to b; None if there is no way. `use_bytes` are the bytes that each use keeps on its device, `tied_bytes`
    those that prologue and epilogue share in one stage. `cut_bytes[i]` cross a cut before block i.

    With `overlap` a device copies its next input while it computes: a stage takes the maximum of the two, else their
    sum. `layers` pins the number of blocks of each stage, `stages` the number of stages. `replicas` is the maximum
    number of devices of one kind that share a stage, each taking every r-th micro-batch; only without an order.
    """

    devices: tuple[DeviceCost, ...]
    links: tuple[tuple[Link | None, ...], ...]
    use_bytes: tuple[float, ...]
    cut_bytes: tuple[float, ...]
    counts: tuple[int, ...] | None = None
    tied_bytes: float = 0.0
    overlap: bool = True
    layers: tuple[int, ...] | None = None
    stages: int | None = None
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.layers is not None and (sum(self.layers) != self.blocks or min(self.layers, default=0) < 1):
            raise StagelineError(
                f"layers {','.join(map(str, self.layers))} do not fit: give each stage at least 1 block, "
                f"{self.blocks} in all"
            )
        if self.stages is not None and not 1 <= self.stages <= self.blocks:
            raise StagelineError(
                f"{self.stages} stages do not fit: the model has {self.blocks} blocks, so choose 1 to {self.blocks}"
            )
        if self.replicas > 1 and (self.counts is None or self.stages is not None):
            raise StagelineError(
                f"{self.replicas} replicas of a stage need devices without an order and no number of stages"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.use_bytes) - 2

    def stage_bytes(self, device: int, first: int, end: int) -> float:
        """Memory of a stage of blocks `first` to `end` - 1 on `device`."""
        tied = self.tied_bytes if (first, end) == (0, self.blocks) else 0.0
        return sum(uses_of(self.use_bytes, first, end)) + self.devices[device].workspace_bytes - tied

    def compute_s(self, device: int, first: int, end: int) -> float:
        """Seconds of a stage of blocks `first` to `end` - 1 on `device` for a micro-batch."""
        cost = self.devices[device]
        return cost.stage_s + stage_time_s(cost.use_s, first, end, cost.later_stage_s)

    def allowed(self, first: int, end: int) -> bool:
        """Whether the pinned layers allow a stage of blocks `first` to `end` - 1."""
        if self.layers is None:
            return True
        ends = list(itertools.accumulate(self.layers))
        return (first, end) in zip((0, *ends), ends, strict=False)


def stage_time_s(use_s: Sequence[float], first: int, end: int, later_stage_s: float = 0.0) -> float:
    """Seconds of a stage of blocks `first` to `end` - 1: those of its uses, and `later_stage_s` if it is not the first
    stage."""
    return sum(uses_of(use_s, first, end)) + (later_stage_s if first else 0.0)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan: blocks `first` to `end` - 1 on `replicas` devices of `device`, its place in the problem."""

    device: int
    first: int
    end: int
    replicas: int = 1


@dataclass(frozen=True)
class StageCost:
    """What a stage costs per micro-batch. `occupied_s` is the time from one micro-batch to the next if this stage were
    the bottleneck; `bubble` is the share of the bottleneck's time in which it waits, 0 to 1."""

    compute_s: float
    copy_s: float
    occupied_s: float
    memory_bytes: float
    bubble: float


@dataclass(frozen=True)
class Plan:
    """An answer: the stages in order, and what they cost together per micro-batch.

    `bottleneck_s` is the time between micro-batches in a full pipeline, `latency_s` the time of one alone through all
    stages, `price_per_h` that of all devices used, `energy_j` that of the steady state, idle power included.
    """

    stages: tuple[PlannedStage, ...]
    figures: tuple[StageCost, ...]
    bottleneck_s: float
    latency_s: float
    price_per_h: float
    energy_j: float

    @classmethod
    def of(cls, problem: Problem, stages: Sequence[PlannedStage]) -> "Plan":
        """The plan of these stages, whether they fit or not."""
        times = []
        for number, stage in enumerate(stages):
            copy_s = 0.0
            if number:
                link = problem.links[stages[number - 1].device][stage.device]
                copy_s = math.inf if link is None else link.copy_s(problem.cut_bytes[stage.first])
            compute_s = problem.compute_s(stage.device, stage.first, stage.end)
            occupied_s = max(compute_s, copy_s) if problem.overlap else compute_s + copy_s
            times.append((compute_s, copy_s, occupied_s / stage.replicas))
        bottleneck_s = max(occupied for _, _, occupied in times)
        devices = [problem.devices[stage.device] for stage in stages]
        return cls(
            tuple(stages),
            tuple(
                StageCost(
                    compute_s,
                    copy_s,
                    occupied_s,
                    problem.stage_bytes(stage.device, stage.first, stage.end),
                    1 - occupied_s / bottleneck_s if bottleneck_s else 0.0,
                )
                for stage, (compute_s, copy_s, occupied_s) in zip(stages, times, strict=True)
            ),
            bottleneck_s,
            sum(compute_s + copy_s for compute_s, copy_s, _ in times),
            sum(device.price_per_h * stage.replicas for device, stage in zip(devices, stages, strict=True)),
            sum(
                (device.busy_w - device.idle_w) * compute_s + device.idle_w * stage.replicas * bottleneck_s
                for device, stage, (compute_s, _, _) in zip(devices, stages, times, strict=True)
            ),
        )

    def value(self, objective: Objective) -> float:
        """What the objective minimises, per micro-batch: seconds (throughput, latency), price in the catalogue's
        currency (cost), joules (energy)."""
        return {
            "throughput": self.bottleneck_s,
            "latency": self.latency_s,
            "cost": self.price_per_h / 3600 * self.bottleneck_s,
            "energy": self.energy_j,
        }[objective]

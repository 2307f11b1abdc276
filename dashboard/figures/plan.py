"""Data of the Plan page: the cost of each block, what crosses each cut, the effect of moving a cut."""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.models.errors import BundleError, StagelineError
from stageline.runtime.bench.records import OURS, Run
from stageline.runtime.bundle.folder import Bundle, read_manifest, tensors_of
from stageline.runtime.bundle.manifest import Manifest, uses_of
from stageline.runtime.planning.cluster import Cluster, parse_devices, unmeasured
from stageline.runtime.planning.cost import cut_values, values_bytes
from stageline.runtime.planning.device_kinds import Rates, catalogue
from stageline.runtime.planning.planner import Answer, Planner
from stageline.runtime.planning.profile import Machine, MachineProfile, read_profile
from stageline.runtime.workload import Workload

THIS_MACHINE = "this machine"
MAX_STAGES = 8  # that the page offers


def open_unverified(folder: Path) -> Bundle:
    """A bundle to look at: manifest and weight headers. Digests are checked only when it runs."""
    manifest = read_manifest(folder)
    try:
        return Bundle(folder, manifest, tensors_of(folder, manifest))
    except OSError as error:
        raise BundleError(f"bundle {folder}: {error}; export the bundle again") from error


def profile_of(folder: Path) -> tuple[MachineProfile | None, str | None]:
    """The profile of this machine, or of another with a warning; without one, None and what to do."""
    try:
        return read_profile(folder, Machine.here())
    except StagelineError as error:
        return None, str(error)


def places() -> list[str]:
    """Where the model can be planned: this machine first, and the devices of the catalogue."""
    return [THIS_MACHINE, *catalogue()]


def max_stages(manifest: Manifest, place: str, workload: Workload) -> int:
    """The max number of stages that can be planned at `place`."""
    stages = min(manifest.blocks, MAX_STAGES, workload.slots if manifest.cached else MAX_STAGES)
    return min(stages, os.cpu_count() or 1) if place == THIS_MACHINE else stages


def planner_for(bundle: Bundle, place: str, stages: int, workload: Workload, profile: MachineProfile | None) -> Planner:
    """A planner for `stages` equal devices at `place`; on this machine with the profiled threads and weights, without a
    profile with usual cores."""
    if place != THIS_MACHINE:
        cluster = parse_devices(f"{stages}x{place}")
        known = catalogue()[place].tflops
        dtype = bundle.manifest.dtype if bundle.manifest.dtype in known else "float16"
        return Planner(bundle, cluster, workload, dtype)
    if profile is None:
        threads = max(1, (os.cpu_count() or 1) // stages)
        return Planner(bundle, unmeasured(parse_devices(_core_names(stages, threads))), workload)
    return Planner(bundle, _cores(stages, profile), workload, profile.machine.quantise or "float32", profile=profile)


def _cores(stages: int, profile: MachineProfile) -> Cluster:
    share = max(1, (os.cpu_count() or 1) // stages)
    threads = max((p.threads for p in profile.points if p.threads <= share), default=1)
    return parse_devices(_core_names(stages, threads), profile.handover_s)


def _core_names(stages: int, threads: int) -> str:
    return ",".join("cpu:" + "+".join(str(n * threads + i) for i in range(threads)) for n in range(stages))


def layers_between(cuts: Sequence[int], blocks: int) -> list[int] | None:
    """The number of blocks of each stage for cuts before these blocks; None if a stage would be empty, or two cross."""
    ends = [0, *cuts, blocks]
    layers = [end - first for first, end in itertools.pairwise(ends)]
    return layers if min(layers) > 0 else None


def moved(planner: Planner, layers: Sequence[int], which: int) -> list[dict[str, Any]]:
    """The prediction for each position of the cut after stage `which`; the other cuts stay."""
    both = layers[which] + layers[which + 1]
    before = sum(layers[:which])
    found = []
    for share in range(1, both):
        answer = planner.cut([*layers[:which], share, both - share, *layers[which + 2 :]])
        found.append({"cut": before + share, "tokens_per_s": answer.tokens_per_s, "bubble": bubble_ratio(answer)})
    return found


def bubble_ratio(answer: Answer) -> float:
    """The share of the stages' time spent waiting for the slowest, 0 to 1."""
    return sum(figures.bubble for figures in answer.plan.figures) / len(answer.plan.figures)


def block_rows(planner: Planner, answer: Answer) -> list[dict[str, Any]]:
    """The cost of each use: stage, time for a micro-batch, parameters, bytes of weights and cache."""
    costs, device = planner.costs(answer.shape), answer.problem.devices[0]
    manifest = planner.bundle.manifest
    cache_tokens = planner.workload.slots * planner.workload.capacity if manifest.cached else 0
    last = len(costs) - 1
    rows = []
    for number, cost in enumerate(costs):
        block = min(max(number - 1, 0), manifest.blocks - 1)
        stage = next(n for n, s in enumerate(answer.plan.stages) if s.first <= block < s.end)
        rows.append(
            {
                "order": number,
                "name": "prologue" if number == 0 else "epilogue" if number == last else f"block {number - 1}",
                "stage": f"stage {stage}",
                "kind": f"kind {manifest.uses[number].part}",
                "ms": device.use_s[number] * 1e3,
                "parameters_m": cost.parameters / 1e6,
                "weights_mb": cost.parameter_bytes / 1e6,
                "cache_mb": cost.cache_token_bytes * cache_tokens / 1e6,
                "memory_mb": (cost.parameter_bytes + cost.cache_token_bytes * cache_tokens) / 1e6,
                "gflop": cost.flops / 1e9,
            }
        )
    return rows


def stage_rows(answer: Answer) -> list[dict[str, Any]]:
    """The cost of each stage of a plan."""
    return [
        {
            "stage": f"stage {number}",
            "blocks": f"{stage.first} to {stage.end - 1}" if stage.end - stage.first > 1 else str(stage.first),
            "compute_ms": figures.compute_s * 1e3,
            "copy_ms": figures.copy_s * 1e3,
            "wait_ms": max(0.0, answer.plan.bottleneck_s - figures.occupied_s) * 1e3,
            "bubble": figures.bubble,
            "memory_mb": figures.memory_bytes / 1e6,
        }
        for number, (stage, figures) in enumerate(zip(answer.plan.stages, answer.plan.figures, strict=True))
    ]


def crossing_rows(bundle: Bundle, answer: Answer) -> list[dict[str, Any]]:
    """The values of a micro-batch that cross each cut of the plan."""
    values = cut_values(bundle.manifest, bundle.parts())
    return [
        {
            "cut": f"{number} → {number + 1}",
            "value": spec.name,
            "dtype": spec.dtype,
            "shape": " × ".join(map(str, spec.shape)),
            "bytes": values_bytes([spec], answer.shape),
        }
        for number, stage in enumerate(answer.plan.stages[1:])
        for spec in values[stage.first]
    ]


@dataclass(frozen=True)
class Roofline:
    """What a device reaches, and each stage's intensity (operations per byte) and attained GFLOP/s."""

    rates: Rates
    stages: list[dict[str, Any]]

    @property
    def ridge(self) -> float:
        """The intensity above which a stage is bound by computing."""
        return self.rates.flops_per_s / self.rates.bytes_per_s


def roofline(planner: Planner, answer: Answer) -> Roofline:
    """The roofline of the plan's devices, with its stages."""
    costs = planner.costs(answer.shape)
    rates = planner.rates(planner.cluster.kinds[0])
    rows = []
    for number, (stage, figures) in enumerate(zip(answer.plan.stages, answer.plan.figures, strict=True)):
        uses = uses_of(costs, stage.first, stage.end)
        flops = sum(use.flops for use in uses)
        moved_bytes = sum(use.weight_read_bytes + use.cache_read_bytes for use in uses)
        intensity, attained = flops / max(1, moved_bytes), flops / figures.compute_s
        roof = min(rates.flops_per_s, rates.bytes_per_s * intensity)
        rows.append(
            {
                "stage": f"stage {number}",
                "intensity": intensity,
                "gflop_per_s": attained / 1e9,
                "share": attained / roof,
                "bound": "memory bandwidth" if intensity < rates.flops_per_s / rates.bytes_per_s else "computing",
            }
        )
    return Roofline(rates, rows)


def roof_points(line: Roofline) -> list[dict[str, float]]:
    """The corners of the roof, drawn around all stages."""
    low = min([line.ridge, *(row["intensity"] for row in line.stages)]) / 4
    high = max([line.ridge, *(row["intensity"] for row in line.stages)]) * 4
    xs = [low, line.ridge, high]
    return [{"intensity": x, "gflop_per_s": min(line.rates.flops_per_s, line.rates.bytes_per_s * x) / 1e9} for x in xs]


def kinds_of_blocks(manifest: Manifest) -> int:
    """The number of distinct kinds of block in the model."""
    return len({use.part for use in manifest.uses[1:-1]})


@dataclass(frozen=True)
class Measured:
    """The most throughput that a run of this model reached with this cut, on whatever machine: `unit` a second."""

    run_id: str
    load: str
    per_s: float
    unit: str


def measured(runs: Iterable[Run], layers: Sequence[int]) -> Measured | None:
    """Of the newest of `runs`, newest first, whose pipeline was cut so; None if there is none."""
    for run in runs:
        own = [one for one in run.measurements if one.contender == OURS]
        if own and list(run.plan.blocks) == list(layers):
            name, unit = (
                ("tokens_per_s", "tokens") if "tokens_per_s" in own[0].figures else ("requests_per_s", "requests")
            )
            best = max(own, key=lambda one: one.figures[name].mean)
            return Measured(run.id, str(best.load), best.figures[name].mean, unit)
    return None

"""Data of the Engines page: timed layers of two engines side by side, and the engines built ahead."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.runtime import words
from stageline.runtime.builder.report import EngineReport
from stageline.runtime.engines.tensorrt.store import read_engines
from stageline.runtime.layers.profile import LayerProfile, StepTimes, family, family_seconds, heaviest
from stageline.runtime.planning.profile import Machine
from stageline.runtime.report.spec import CONTENDERS, OTHERS

HEAVIEST = 10
_LEAST = 0.0005  # of the time: a smaller share would be shown as none


def named(profiles: Sequence[LayerProfile]) -> dict[str, LayerProfile]:
    """Profiles by their engine, newest first; those of another machine say so."""
    here = Machine.here()
    found: dict[str, LayerProfile] = {}
    for one in profiles:
        machine = one.machine
        there = "" if (machine.cpu, machine.cores) == (here.cpu, here.cores) else f" on {machine.cpu}"
        found.setdefault(f"{one.engine}{there}", one)
    return found


def stale(profile: LayerProfile, layers: Sequence[int]) -> bool:
    """Whether the bundle, of stages with so many blocks, was cut otherwise when this was timed."""
    return profile.blocks != list(layers)


def steps(profile: LayerProfile) -> dict[str, StepTimes]:
    """What was timed, by its shape."""
    return {step.shape: step for step in profile.steps}


def unlike(a: LayerProfile, b: LayerProfile) -> str | None:
    """Why the times of two profiles are not compared; None if they are."""
    if (a.machine.cpu, a.machine.cores) != (b.machine.cpu, b.machine.cores):
        return "they were timed on different machines"
    if a.threads != b.threads:
        return f"one ran on {words.counted(a.threads, 'core')}, the other on {b.threads}"
    if a.blocks != b.blocks:
        return "they were timed with other cuts: stages of " + " and of ".join(
            " + ".join(map(str, one.blocks)) for one in (a, b)
        ) + " blocks"  # fmt: skip
    return None


def place(profile: LayerProfile) -> str:
    """Where it was timed."""
    on_gpu = profile.machine.engine.startswith("tensorrt")
    return profile.machine.cpu if on_gpu else words.counted(profile.threads, "core")


def facts(profile: LayerProfile, step: StepTimes) -> dict[str, str]:
    """An engine's time, precisions and memory, in words."""
    total = step.layer_seconds
    precisions: dict[str, float] = {}
    for stage in step.stages:
        for layer in stage.layers:
            precisions[layer.precision] = precisions.get(layer.precision, 0.0) + layer.seconds
    computing = sorted(precisions.items(), key=lambda pair: -pair[1])
    caches = sum(stage.cache_bytes for stage in profile.stages)
    return {
        "all stages, one after the other": words.seconds(step.seconds),
        "of it in layers": f"{words.seconds(total)}, {words.share(total / step.seconds)}",
        "layers": f"{sum(len(stage.layers) for stage in step.stages):,}",
        "computes in (share of time)": ", ".join(
            f"{name} {words.share(s / total)}" for name, s in computing if s >= _LEAST * total
        ),
        "weights": ", ".join(f"{words.size(size)} {dtype}" for dtype, size in profile.weights.items()) or "none",
        "caches": words.size(caches) if caches else "none",
    }


def family_rows(named_steps: dict[str, StepTimes]) -> list[dict[str, Any]]:
    """The time of each family of layers in each engine, in seconds, with its share of the engine's layers."""
    return [
        {"engine": name, "family": what, "seconds": seconds, "share": seconds / step.layer_seconds}
        for name, step in named_steps.items()
        for what, seconds in family_seconds(step).items()
        if any(family_seconds(other)[what] for other in named_steps.values())
    ]


def colours(profiles: dict[str, LayerProfile]) -> dict[str, str]:
    """A colour for each: its engine's on all pages, another one for a second profile of the same engine."""
    found: dict[str, str] = {}
    for name, profile in profiles.items():
        own = CONTENDERS.get(profile.machine.engine, OTHERS[0])
        found[name] = OTHERS[1] if own in found.values() else own
    return found


def layer_rows(step: StepTimes, count: int | None) -> list[dict[str, Any]]:
    """The heaviest `count` layers (None: all of them), longest first; shares are in percent of all layers' time."""
    number = sum(len(stage.layers) for stage in step.stages) if count is None else count
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "what it does": family(layer.kind),
            "stage": stage,
            "computes in": layer.precision,
            "time": words.seconds(layer.seconds),
            "share": 100 * layer.seconds / step.layer_seconds,
        }
        for stage, layer in heaviest(step, number)
    ]


@dataclass(frozen=True)
class EngineRow:
    """An engine in the bundle as a row of a table, and its layers by kind (empty if its report cannot be read)."""

    row: dict[str, str]
    kinds: dict[str, int]


def engine_reports(folder: Path) -> list[EngineRow]:
    """The engines that `stageline build` put into the bundle. BundleError if their manifest is not valid."""
    found = []
    for engine in sorted(read_engines(folder).engines, key=lambda one: (_first_block(one.stage), one.target)):
        try:
            kinds = EngineReport.model_validate_json((folder / engine.report.path).read_bytes()).kinds
        except (OSError, ValueError):
            kinds = {}
        row = {
            "stage": _blocks_of(engine.stage),
            "engine": f"{engine.flavour} {engine.version}",
            "target": engine.target,
            "precision": engine.precision,
            "size": words.size(engine.plan.size_bytes),
            "build": words.seconds(engine.build_s),
            "layers": f"{sum(kinds.values()):,}" if kinds else "-",
        }
        found.append(EngineRow(row, dict(sorted(kinds.items(), key=lambda pair: -pair[1]))))
    return found


def _first_block(stage: str) -> int:
    numbers = re.findall(r"\d+", stage)
    return int(numbers[0]) if numbers else 0


def _blocks_of(stage: str) -> str:
    """stage.003-005.onnx -> blocks 3 to 5."""
    numbers = [str(int(number)) for number in re.findall(r"\d+", stage)]
    return f"blocks {' to '.join(dict.fromkeys(numbers))}" if numbers else stage

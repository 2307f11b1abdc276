"""The command `stageline layers`."""

from typing import Annotated

import typer
from stageline.exporter.commands import common
from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.layers.measure import time_layers
from stageline.runtime.layers.profile import (
    LayerProfile,
    StepTimes,
    family_seconds,
    heaviest,
    write_layers,
)

_HEAVIEST = 10


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("layers")(layers_command)


def layers_command(
    bundle: common.BundleArgument,
    engine: Annotated[common.EngineName, typer.Option(help="The engine whose layers are timed.")] = "onnxruntime",
    threads: common.ThreadsOption = None,
    quantise: common.QuantiseOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Time the layers of a bundle's stages inside their engine.

    Shows the ten that take the most time, what kinds of layer the time goes to, and what the engine holds in memory.
    For onnxruntime, openvino and tensorrt. The times are stored in the bundle, for the dashboard.

    Example: stageline layers minilm.bundle --engine openvino
    """
    opened = Bundle.open(bundle)
    with common.share_shown() as progress:
        profile = time_layers(opened, engine, threads, quantise, progress)
    file = write_layers(opened, profile)
    lines = [f"{profile.engine}, {words.counted(profile.threads, 'core')}: {_memory(profile)}"]
    for step in profile.steps:
        lines += ["", _step(step)]
    common.print_result(as_json, profile.model_dump(mode="json"), "\n".join([*lines, "", str(file)]))


def _memory(profile: LayerProfile) -> str:
    weights = ", ".join(f"{words.size(size)} {dtype}" for dtype, size in profile.weights.items())
    caches = sum(stage.cache_bytes for stage in profile.stages)
    return f"weights {weights or 'none'}" + (f"; caches {words.size(caches)}" if caches else "")


def _step(step: StepTimes) -> str:
    total = step.layer_seconds
    rows = [
        [
            str(stage),
            layer.name,
            layer.kind,
            layer.precision,
            f"{layer.seconds * 1e3:.3f}",
            f"{layer.seconds / total:.1%}",
        ]
        for stage, layer in heaviest(step, _HEAVIEST)
    ]
    kinds = [f"{name} {seconds / total:.1%}" for name, seconds in family_seconds(step).items() if seconds]
    return "\n".join(
        [
            f"{step.shape}: {words.seconds(step.seconds)} through all stages, {words.seconds(total)} of it in layers "
            f"(mean of {step.runs} runs)",
            table(["stage", "layer", "kind", "computes in", "ms", "share"], rows),
            ", ".join(kinds),
        ]
    )

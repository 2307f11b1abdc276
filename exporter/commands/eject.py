"""The command `stageline eject`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from stageline.exporter.commands import common, hub
from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eject")(eject_command)


def eject_command(
    bundle: hub.BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The new folder.")],
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        typer.Option(help="What the models compute in; ONNX Runtime on CPUs does not run bf16."),
    ] = "fp32",
    capacity: Annotated[int, typer.Option(min=2, help="Tokens of a row's KV cache, fixed in the models.")] = 64,
    as_json: common.JsonOption = False,
) -> None:
    """Write a bundle's stages as plain ONNX models with samples, for Polygraphy, trtexec, Netron and onnx.checker.

    Each stage has its weights beside it, two samples of inputs, the outputs that ONNX Runtime computes for them in
    float32, and command lines that compare, inspect, reduce and build it, in README.md.

    Example: stageline eject minilm.bundle -o minilm.stages
    """
    with common.needs("eject writes samples for Polygraphy", "debug", "polygraphy"):
        from stageline.exporter.eject.folder import eject
    opened = Bundle.open(hub.bundle_of(bundle))
    with common.progress_steps() as progress:
        stages = eject(opened, output, precision, capacity, progress)
    rows = [[str(stage.stage), stage.model, words.size(stage.weight_bytes)] for stage in stages]
    lines = [table(["stage", "model", "weights"], rows), f"\nCompare each with its expected outputs (in {output}):"]
    lines += [f"  {stage.lines.onnxruntime}" for stage in stages]
    lines += [f"More lines, for inspect, reduce and TensorRT: {output / 'README.md'}"]
    document = {
        "bundle": str(bundle),
        "folder": str(output),
        "precision": precision,
        "stages": [asdict(stage) for stage in stages],
    }
    common.print_result(as_json, document, "\n".join(lines))

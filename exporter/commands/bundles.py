"""The commands `stageline export`, `recut` and `inspect`: making a bundle, cutting it, looking at it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from stageline.exporter.commands import common, hub, show
from stageline.models.errors import BundleError
from stageline.runtime import words
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.graph import size_bytes
from stageline.runtime.bundle.recut import recut, recut_copy
from stageline.runtime.engines.lowering.kept import kept

StagesOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of stages; blocks are spread so that costs are even.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export")(export_command)
    app.command("recut")(recut_command)
    app.command("inspect")(inspect_command)


def export_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=hub.CHECKPOINT_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The new bundle's folder.")],
    stages: StagesOption = None,
    layers: common.LayersOption = None,
    dtype: Annotated[
        common.DtypeName | None,
        typer.Option(help="Weights' type (default: the checkpoint's; quantised ones stay as they are)."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The model's task, such as text-generation (default: the checkpoint's).")
    ] = None,
    quantise: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Round matrices to whole numbers of 8 or 4 bits; embeddings and heads always to 8."),
    ] = None,
    group: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(help="--quantise: weights of a row that have a scale together (default: 32)."),
    ] = None,
    method: Annotated[
        Literal["nearest", "gptq"] | None,
        typer.Option(
            help="--quantise: round each weight to the nearest number (default), or matrices so that their products "
            "keep on text that the model draws itself."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="--method gptq: a text per line, in place of what the model draws."),
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle of pipeline stages.

    With --quantise int8 or int4 the bundle is smaller and less exact: stageline verify BUNDLE --perplexity says how
    much. --method gptq loses less, takes minutes, and holds the model in float32 in memory.

    Example: stageline export models/checkpoints/minilm -o minilm.bundle --stages 2 --quantise int8
    """
    cuts = _cuts(stages, layers) or 1
    for option, value in (("--group", group), ("--method", method)):
        if value is not None and quantise is None:
            raise common.UsageError(f"{option} is for --quantise int8 or int4")
    if calibrate is not None and method != "gptq":
        raise common.UsageError("--calibrate is for --method gptq")
    begin = time.perf_counter()
    with common.needs(*common.EXPORTER):
        from stageline.exporter.export import export
        from stageline.exporter.quantise.choice import Quantisation
        from stageline.runtime.bench.inputs import read_texts
    source = hub.checkpoint_of(checkpoint)
    with common.progress_steps() as progress:
        texts = () if calibrate is None else tuple(read_texts(calibrate))
        rounding = None if quantise is None else Quantisation(quantise, int(group or 32), method or "nearest", texts)
        bundle = export(source, output, stages=cuts, dtype=dtype, task=task, quantise=rounding, progress=progress)
    seconds = time.perf_counter() - begin
    manifest = bundle.manifest
    how: dict[str, Any] = {
        "trace": manifest.trace,
        "attention": manifest.attention,
        "no_cache_reason": manifest.no_cache_reason,
        "checked": manifest.checked,
        "notes": manifest.notes,
    }
    summary = {"bundle": str(output), **_summary(bundle), **how, "seconds": seconds}
    common.print_result(
        as_json,
        summary,
        f"{output}: {words.counted(summary['stages'], 'stage')}, {words.counted(summary['blocks'], 'block')}, "
        f"{bundle.parameters:,} parameters, {words.size(bundle.weight_bytes)} of weights, in {seconds:.1f} s\n"
        + "\n".join(
            [
                manifest.trace,
                show.attention(manifest),
                *show.generation(manifest),
                *show.notes(manifest),
                *show.quantised(bundle),
            ]
        ),
    )


def recut_command(
    bundle: common.BundleArgument,
    stages: StagesOption = None,
    layers: common.LayersOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="BUNDLE", help="Cut a new copy here; leave the bundle as it is."),
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """Write other stages into a bundle, in place. Needs neither the checkpoint nor torch.

    Example: stageline recut minilm.bundle --layers 2,2,2
    """
    cuts = _cuts(stages, layers)
    if cuts is None:
        raise common.UsageError("give --stages or --layers")
    if output is None:
        done = recut(bundle, cuts)
    elif output.exists():
        raise BundleError(f"{output} is there already; give another folder, or delete it")
    else:
        done = recut_copy(bundle, output, cuts)
    common.print_result(as_json, _description(done), show.bundle(done))


def inspect_command(bundle: hub.BundleArgument, as_json: common.JsonOption = False) -> None:
    """Show a bundle's stages and the values that cross each cut.

    Example: stageline inspect minilm.bundle
    """
    opened = Bundle.open(hub.bundle_of(bundle))
    common.print_result(as_json, _description(opened), show.bundle(opened))


def _cuts(stages: int | None, layers: str | None) -> int | list[int] | None:
    """What --stages or --layers asks for; None if neither is given."""
    if layers is not None and stages is not None:
        raise common.UsageError("give --stages or --layers, not both")
    return stages if layers is None else common.numbers(layers, "--layers", int)


def _summary(bundle: Bundle) -> dict[str, Any]:
    return {
        "stages": len(bundle.manifest.stages),
        "blocks": bundle.manifest.blocks,
        "parameters": bundle.parameters,
        "weight_bytes": bundle.weight_bytes,
    }


def _description(bundle: Bundle) -> dict[str, Any]:
    """What `inspect` and `recut` print as JSON."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        **{
            name: getattr(manifest, name)
            for name in ("task", "architecture", "dtype", "trace", "attention", "no_cache_reason", "checked", "notes")
        },
        **_summary(bundle),
        "quantised": [asdict(way) for way in kept(bundle.weights.values())],
        "stages": [stage.model_dump(exclude={"inputs", "outputs"}) for stage in manifest.stages],
        "cuts": [
            [{**spec.model_dump(), "nominal_bytes": size_bytes(spec.shape, spec.dtype)} for spec in specs]
            for specs in show.cuts(manifest)
        ],
    }

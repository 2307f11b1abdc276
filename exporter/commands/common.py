"""What several commands share: their arguments and options, how a result is printed, progress, missing packages."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.engines import WeightDtype
from stageline.runtime.options import DEFAULT_CAPACITY, PipelineOptions
from stageline.runtime.workload import Workload

if TYPE_CHECKING:
    from rich.progress import Progress

EngineName = Literal["onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt"]
DtypeName = Literal["float32", "float16", "bfloat16"]
_Number = TypeVar("_Number", int, float)
EXPORTER = (
    "this command needs the exporter",
    "export",
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "onnxscript",
)  # what `needs` takes

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
StoreOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The benchmark runs' store (default: in the user's data folder)."),
]
LayersOption = Annotated[str | None, typer.Option(metavar="N,N,...", help="Blocks of each stage, such as 8,7,9.")]
EngineOption = Annotated[
    Literal["onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt", "auto"],
    typer.Option(help="What runs the stages; see stageline doctor. auto: the fastest, measured once."),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--error-budget",
        min=0,
        metavar="E",
        help="With --engine auto: also quantised weights, up to an error such as 0.05.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        metavar="D,D,...",
        help="Devices that the stages take in turn, such as cuda:0,cuda:1 or tcp://node1:7070 (default: the engine's).",
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="STAGELINE_KEY_FILE",
        help="The key of stage hosts, for devices such as tcp://node1:7070.",
    ),
]
IsolateOption = Annotated[
    bool,
    typer.Option("--isolate", help="Each stage in a process of its own: one that crashes is started again."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU cores that the stages share (default: all that this process may use).")
]
QuantiseOption = Annotated[
    WeightDtype | None,
    typer.Option(
        help="Quantise the weights of matrix products when the pipeline opens: faster, less exact. float32: unpack "
        "those that the checkpoint has quantised."
    ),
]
SlotsOption = Annotated[int, typer.Option(min=1, help="Sequences generated at a time, one KV-cache row each.")]
CapacityOption = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a slot, prompt and output together (default: the model's limit, up to 2048)."),
]
DraftOption = Annotated[
    str,
    typer.Option(
        metavar="off|lookup|BUNDLE",
        help="Compute drafts of tokens that the text so far suggests (lookup), or a small BUNDLE of the same "
        "vocabulary; for CPUs.",
    ),
]
MicroBatchOption = Annotated[int, typer.Option(min=1, help="Max rows of a micro-batch (models without a KV cache).")]
HostOption = Annotated[str, typer.Option(help="The address to listen on.")]


class UsageError(typer.TyperException):
    """Options that are missing or do not go together."""

    exit_code = 2


def print_result(as_json: bool, data: Any, text: str) -> None:
    """Print a command's result on stdout: `data` as one JSON document, or `text`. JSON has no infinity and no NaN: they
    are null."""
    print(json.dumps(_finite(data), indent=2) if as_json else text)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def workload(manifest: Manifest, micro_batch: int, length: int | None, slots: int, capacity: int | None) -> Workload:
    """What the options ask of a bundle's pipeline, within what its model can place. RequestError if they ask more."""
    limit = manifest.max_positions or DEFAULT_CAPACITY
    for name, tokens in (("--length", length), ("--capacity", capacity)):
        if manifest.max_positions is not None and tokens is not None and tokens > limit:
            raise RequestError(f"{name} is {tokens}, the model can place {limit} tokens; lower it")
    length = length or min(limit, Workload.length)
    return Workload(micro_batch, length, slots, capacity or min(limit, DEFAULT_CAPACITY))


def numbers(text: str | None, option: str, kind: Callable[[str], _Number]) -> list[_Number]:
    """The numbers in a comma-separated list; none for None. A usage error names `option`."""
    try:
        return [kind(number) for number in text.split(",")] if text else []
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 8,7,9", param_hint=option) from error


def size_bytes(text: str | None, option: str) -> float | None:
    """The bytes of a size such as 8GB (decimal, as everywhere) or 8GiB; None for None. A usage error names `option`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT])(i?)B", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 8GB or 512MB", param_hint=option)
    unit = 1024.0 if found[3] else 1000.0
    return float(found[1]) * float(unit ** (1 + "kMGT".index(found[2])))


def seconds(text: str | None, option: str) -> float | None:
    """The seconds of a time such as 50ms or 0.5s; None for None. A usage error names `option`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s)", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a time such as 50ms or 0.5s", param_hint=option)
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def split(text: str | None) -> list[str] | None:
    """The names in a comma-separated list; None for None."""
    return [name.strip() for name in text.split(",")] if text else None


@contextmanager
def needs(what: str, extra: str, *packages: str) -> Iterator[None]:
    """Put around imports of an extra's `packages`: StagelineError with the pip command if one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        raise StagelineError(f'{what}: pip install "stageline[{extra}]"') from error


@contextmanager
def progress_steps() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current step on stderr: a spinner on a terminal, one line per step elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: print(step, file=sys.stderr)
        return
    with console.status("starting") as status:
        yield status.update


@contextmanager
def progress_bar(*columns: Any) -> Iterator["Progress | None"]:
    """Yield a bar of rich `columns` on stderr, erased at the end; None if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@contextmanager
def share_shown() -> Iterator[Callable[[float, str], None]]:
    """Yield a function that shows a share and the current step on stderr: a bar with the time left on a terminal, else
    a line for each tenth."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    percentage, description = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
    columns = (BarColumn(), percentage, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), description)
    with progress_bar(*columns) as bar:
        if bar is None:
            shown = [-1]

            def line(share: float, step: str) -> None:
                if int(share * 10) > shown[0]:
                    shown[0] = int(share * 10)
                    print(f"{share:4.0%} {step}", file=sys.stderr)

            yield line
            return
        task = bar.add_task("opening", total=1.0)
        yield lambda share, step: bar.update(task, completed=share, description=step)


def with_engine(bundle: Path, options: PipelineOptions, budget: float | None) -> PipelineOptions:
    """The options with an engine: for `auto` the one that is fastest on this bundle, which it says on stderr.

    A usage error for a budget that nothing would use.
    """
    if options.engine != "auto":
        if budget is not None:
            raise UsageError("--error-budget is for --engine auto")
        return options
    from stageline.runtime.engine_choice import chosen

    def tell(line: str) -> None:
        print(f"stageline: {line}", file=sys.stderr)

    choice = chosen(bundle, options, budget, tell)
    for line in choice.lines():
        tell(line)
    return choice.applied(options)

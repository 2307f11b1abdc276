"""The commands `stageline bench BUNDLE` and `stageline bench list`, `show`, `compare`, `export`, `import`, `delete`."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
from stageline.exporter.commands import bench_show
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.bench import files as exchange
from stageline.runtime.bench import options as prepare
from stageline.runtime.bench.compare import JUDGED, compare
from stageline.runtime.bench.records import OURS, Progress, Run, RunSettings
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import WeightDtype
from stageline.runtime.stages.recorder import Recorder
from typer.core import TyperGroup

BASELINES = ("torch", "torch-compile", "onnxruntime", "openvino")
_RUN = "run"
_QUEUE = 4096  # requests that may wait in the pipeline; those beyond wait in the load generator
_DEFAULT_NEW = 32
_TORCH = {"torch", "transformers"}


class _DefaultToRun(TyperGroup):
    """`stageline bench BUNDLE ...` is `stageline bench run BUNDLE ...`: what is no command's name is the run's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help",):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DefaultToRun, rich_markup_mode=None, pretty_exceptions_enable=False)
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="FILE", help="Of the runs; in the user's data folder unless given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="An id, the beginning of one, latest, or latest~1.")]


def register(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    parent.add_typer(
        app,
        name="bench",
        help="Measure a bundle (stageline bench BUNDLE) beside others, and keep the results.\n\n"
        "Options of a run: stageline bench run --help. A bundle called like a command: ./list.\n\n"
        "Example: stageline bench minilm.bundle --baseline onnxruntime",
    )


@app.command(_RUN)
def run_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    scenario: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME", help="Of SingleStream, Offline, Server; all unless another load is asked for."
        ),
    ] = None,
    server_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Requests/s of Server; 70 % of the warm-up's unless given.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,N", help="Closed loops: so many requests at a time.")
    ] = None,
    rate: Annotated[str | None, typer.Option(metavar="R,R", help="Open loops: Poisson arrivals, requests/s.")] = None,
    arrivals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An open loop of recorded arrivals: seconds, one a line.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each repeat.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Of each load; confidence intervals need two.")] = 3,
    warm_up: Annotated[float, typer.Option(min=0.1, help="Seconds, once for each contender.")] = 2.0,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one a line; built-in ones unless given.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N-N", help="Random tokens of such lengths in place of texts.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts a request holds (models that do not generate).")] = 1,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens to draw a request ({_DEFAULT_NEW} unless given).")
    ] = None,
    slo: Annotated[str, typer.Option(metavar="BOUNDS", help="For goodput: ttft=200ms,tpot=50ms,latency=2s.")] = "",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|URL", help=f"Measured in turn: {', '.join(BASELINES)}, or an OpenAI-compatible URL."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="For the baselines torch and torch-compile.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a URL's models; its first unless given.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="STAGELINE_API_KEY", help="For a URL.")] = None,
    engine: Annotated[str, typer.Option(help="What runs the stages; stageline doctor lists them.")] = "onnxruntime",
    device: Annotated[
        list[str] | None, typer.Option(metavar="DEVICE", help="cpu, cuda:0, ...: of the stages in turn; several times.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processors; all unless given.")] = None,
    weights: Annotated[WeightDtype | None, typer.Option(help="Quantise matrix products.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Continuations that run at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and of the order of texts.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the run, for people; the bundle's folder unless given.")] = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Of the run; refused where the store has it already.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the pipeline's timeline for ui.perfetto.dev.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle under load, beside baselines, and keep the results in the store.

    Requests are timed from their intended arrival. Ctrl-C ends the run as cancelled and keeps what was measured.

    Example: stageline bench minilm.bundle --concurrency 1,2,4 --baseline onnxruntime
    """
    from stageline.runtime.bench.inputs import built_in_texts, make_items, read_texts
    from stageline.runtime.bench.runner import bench

    if lengths is not None and texts is not None:
        raise typer.BadParameter("give --texts or --lengths, not both", param_hint="--lengths")
    asked = prepare.loads(
        scenario.split(",") if scenario else (),
        server_rate,
        _numbers(concurrency, int, "--concurrency"),
        _numbers(rate, float, "--rate"),
        arrivals is not None,
    )
    bounds = prepare.slo(slo)
    given = prepare.lengths(lengths) if lengths else read_texts(texts) if texts else built_in_texts()
    recorded = prepare.arrivals(arrivals) if arrivals is not None else []
    opened = Bundle.open(bundle)
    generates = opened.manifest.cached
    if not generates and new_tokens is not None:
        raise RequestError("--new-tokens is for a bundle that generates, this one does not; leave it out")
    if generates and rows > 1:
        raise RequestError("--rows is for a bundle that does not generate, this one does; leave it out")
    output = (new_tokens or _DEFAULT_NEW) if generates else None
    from stageline.runtime.options import DEFAULT_CAPACITY

    capacity = min(opened.manifest.max_positions or DEFAULT_CAPACITY, DEFAULT_CAPACITY) if generates else None
    items, told = make_items(opened, given, rows, output, capacity, seed)
    openers = _openers(
        opened, baseline or [], checkpoint, threads=threads, slots=slots, engine=engine, device=device, weights=weights,
        model=model, api_key=api_key,
    )  # fmt: skip
    settings = RunSettings(
        asked, repeats, seconds, warm_up, seed, told, rows, output, bounds, tuple(baseline or ()), engine, threads,
        weights, slots if generates else None,
    )  # fmt: skip
    into = Store(store)
    run = prepare.new_run(opened, settings, device, run_id, name)
    into.begin(run)
    recorders: list[Recorder] = []
    with _stopped_by_signals() as stop, _progress(run) as follow:
        done = bench(
            run, into, openers, items, arrivals_s=recorded, stop=stop, told=follow,
            recorded=recorders.append,
        )  # fmt: skip
    if trace is not None:
        _write_trace(trace, done, recorders)
    _print(as_json, _plain(done), bench_show.run(done))
    raise typer.Exit(0 if done.status == "done" else 130)


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs in the store, newest first.

    Example: stageline bench list
    """
    found = Store(store)
    lines = found.runs(limit)
    empty = f"no runs in {found.path}; make one with: stageline bench BUNDLE"
    _print(as_json, [asdict(line) for line in lines], bench_show.runs(lines) if lines else empty)


@app.command("show")
def show_command(run: RunArgument = "latest", store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show a run: where it was made, and all that it measured.

    Example: stageline bench show latest
    """
    found = Store(store)
    done = found.run(found.find(run))
    _print(as_json, _plain(done), bench_show.run(done))


@app.command("compare")
def compare_command(
    before: Annotated[str, typer.Argument(metavar="A", help="The run to compare with.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The run to judge.")],
    threshold: Annotated[float, typer.Option(min=0, help="Per cent worse that is still no regression.")] = 5.0,
    figure: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Judge this figure; several times.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what differs from run A to run B, and how surely; exit with 1 where B regressed.

    A figure regressed if it is worse by more than the threshold and the 95 % confidence interval of the difference
    (Welch's t over the repeats) leaves out zero.

    Example: stageline bench compare latest~1 latest --threshold 5
    """
    from stageline.runtime.bench.figures import MEANINGS

    for name in figure or ():
        if name not in MEANINGS:
            raise typer.BadParameter(f"unknown figure {name!r}; known: {', '.join(MEANINGS)}", param_hint="--figure")
    found = Store(store)
    changes = compare(found.run(found.find(before)), found.run(found.find(after)), threshold / 100, figure or JUDGED)
    worse = [change for change in changes if change.verdict == "regressed"]
    verdict = f"{len(worse)} of {len(changes)} figures regressed by more than {threshold:g} %"
    plain = [{**asdict(change), "sure": change.sure, "verdict": change.verdict} for change in changes]
    _print(as_json, {"changes": plain, "regressed": len(worse)}, f"{bench_show.changes(changes)}\n{verdict}")
    raise typer.Exit(1 if worse else 0)


@app.command("export")
def export_command(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Ending with .json, .csv or .parquet.")
    ],
    store: StoreOption = None,
) -> None:
    """Write a run and its requests to a file: JSON holds all of it, CSV and Parquet are tables of requests.

    Example: stageline bench export latest -o run.parquet
    """
    found = Store(store)
    exchange.save(exchange.read(found, found.find(run)), output)
    print(output)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That `stageline bench export` wrote.")],
    store: StoreOption = None,
) -> None:
    """Read an exported run into the store.

    Example: stageline bench import run.json
    """
    whole = exchange.load(file)
    Store(store).put(whole.run, whole.requests, whole.timelines)
    print(whole.run.id)


@app.command("cancel")
def cancel_command(run: RunArgument, store: StoreOption = None) -> None:
    """Ask the process that makes a run to stop; it keeps what it has measured.

    Example: stageline bench cancel latest
    """
    found = Store(store)
    run_id = found.find(run)
    if not found.cancel(run_id):
        raise StagelineError(f"run {run_id} does not run; see stageline bench list")
    print(run_id)


@app.command("delete")
def delete_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The whole id.")], store: StoreOption = None
) -> None:
    """Remove a run and all its requests from the store.

    Example: stageline bench delete 20260131-235959-a1b2c3
    """
    Store(store).delete(run)
    print(run)


def _openers(
    bundle: Bundle, baselines: Sequence[str], checkpoint: Path | None, *, threads: int | None, slots: int,
    engine: str, device: list[str] | None, weights: WeightDtype | None, model: str | None, api_key: str | None,
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """What opens each contender, ours first. Refuses what cannot be opened before anything is measured."""
    from stageline.runtime.bench.baselines import onnxruntime_session, openvino_model
    from stageline.runtime.bench.contenders import PipelineContender
    from stageline.runtime.bench.endpoint import Endpoint
    from stageline.runtime.pipeline import Pipeline

    def ours() -> PipelineContender:
        pipeline = Pipeline.open(
            bundle.path, engine=engine, devices=device, threads=threads, queue=_QUEUE, quantise=weights, slots=slots
        )
        return PipelineContender(OURS, pipeline)

    openers: dict[str, Callable[[], Any]] = {OURS: ours}
    for name in baselines:
        if name.startswith(("http://", "https://")):
            openers[name] = partial(Endpoint, name, model, api_key)
        elif name == "onnxruntime":
            openers[name] = partial(onnxruntime_session, bundle.path, threads, slots)
        elif name == "openvino":
            openers[name] = partial(openvino_model, bundle.path, threads)
        elif name in ("torch", "torch-compile"):
            if checkpoint is None:
                raise typer.BadParameter(f"{name} needs the checkpoint: give --checkpoint", param_hint="--baseline")
            openers[name] = partial(_torch, name, checkpoint, bundle, threads, slots)
        else:
            known = ", ".join((*BASELINES, "a URL"))
            raise typer.BadParameter(f"unknown baseline {name!r}; known: {known}", param_hint="--baseline")
    return openers


def _torch(name: Any, checkpoint: Path, bundle: Bundle, threads: int | None, slots: int) -> Any:
    try:
        from stageline.exporter.torch_baseline import torch_contender
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TORCH:
            raise
        raise StagelineError(f'baseline {name} needs torch: pip install "stageline[export]"') from error
    return torch_contender(name, checkpoint, bundle.manifest, threads, slots)


def _write_trace(path: Path, run: Run, recorders: Sequence[Recorder]) -> None:
    from stageline.runtime.bench import perfetto

    spans = [span for recorder in recorders for span in recorder.spans()]
    requests = [request for recorder in recorders for request in recorder.requests()]
    perfetto.write(path, spans, requests, f"{run.id} {run.name}")


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts as usual."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        for own, handler in before.items():
            signal.signal(own, handler)

    if threading.current_thread() is threading.main_thread():
        for number in before:
            signal.signal(number, handle)
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _progress(run: Run) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal's stderr, a line a step elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"run {run.id}", file=sys.stderr)
        last = [""]

        def line(progress: Progress) -> None:
            if progress.step != last[0]:
                print(f"{progress.share:4.0%} {progress.step}", file=sys.stderr)
                last[0] = progress.step

        yield line
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def update(progress: Progress) -> None:
            speed = progress.live.get("requests_per_s")
            told = f"{progress.step}{f': {speed:.4g} requests/s' if speed is not None else ''}"
            bar.update(task, completed=progress.share, description=told)

        yield update


def _numbers(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any]:
    if not text:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not numbers like 1,2,4", param_hint=option) from error


def _plain(run: Run) -> Any:
    return pydantic.TypeAdapter(Run).dump_python(run, mode="json")


def _print(as_json: bool, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if as_json else text)

"""The commands `stageline bench BUNDLE` and `stageline bench list`, `show`, `compare`, `export`, `import`, `delete`."""

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
from stageline.exporter.commands import bench_show, common, hub
from stageline.exporter.commands.bench_judge import compare_command
from stageline.models.errors import RequestError, StagelineError
from stageline.runtime.bench import files, options
from stageline.runtime.bench.records import OURS, Progress, Run, RunSettings
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.recorder import Recorder
from typer.core import TyperGroup

BASELINES = ("torch", "torch-compile", "onnxruntime", "openvino")
_RUN = "run"
_QUEUE = 4096  # requests that may wait in the pipeline; those beyond wait in the load generator
_DEFAULT_NEW = 32


class _DefaultToRun(TyperGroup):
    """`stageline bench BUNDLE ...` means `stageline bench run BUNDLE ...`, unless BUNDLE is a command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help",):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DefaultToRun, rich_markup_mode=None, pretty_exceptions_enable=False)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="An id, the beginning of one, latest, or latest~1.")]


def register(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    parent.add_typer(
        app,
        name="bench",
        help="Measure a bundle against baselines and keep the results.\n\n"
        "Options of a run: stageline bench run --help. A bundle with the name of a command: ./list.\n\n"
        "Example: stageline bench minilm.bundle --baseline onnxruntime",
    )


@app.command(_RUN)
def run_command(
    bundle: hub.BundleArgument,
    scenario: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME", help="SingleStream, Offline, Server (default: all, unless another load is given)."
        ),
    ] = None,
    server_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Requests/s of Server (default: 70 % of the warm-up's).")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,N", help="Closed loops with N requests at a time.")
    ] = None,
    rate: Annotated[str | None, typer.Option(metavar="R,R", help="Open loops: Poisson arrivals, requests/s.")] = None,
    arrivals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An open loop of recorded arrivals: seconds, one per line.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds per repeat.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each load; confidence intervals need two.")] = 3,
    warm_up: Annotated[float, typer.Option(min=0.1, help="Seconds of warm-up, once per contender.")] = 2.0,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one per line (default: built-in ones).")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N-N", help="Random tokens of these lengths instead of texts.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts per request (models that do not generate).")] = 1,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens to draw per request (default: {_DEFAULT_NEW}).")
    ] = None,
    slo: Annotated[
        str, typer.Option(metavar="BOUNDS", help="Bounds for goodput: ttft=200ms,tpot=50ms,latency=2s.")
    ] = "",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|URL", help=f"Measured alternately: {', '.join(BASELINES)}, or an OpenAI-compatible URL."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="For the baselines torch and torch-compile."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model of the URL (default: its first).")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="STAGELINE_API_KEY", help="API key for the URL.")] = None,
    engine: common.EngineOption = "onnxruntime",
    devices: common.DevicesOption = None,
    threads: common.ThreadsOption = None,
    quantise: common.QuantiseOption = None,
    slots: common.SlotsOption = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals and of the order of texts.")] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: the bundle's folder).")] = None,
    run_id: Annotated[str | None, typer.Option(metavar="ID", help="Id of the run; must be new in the store.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the pipeline's timeline for ui.perfetto.dev.")
    ] = None,
    store: common.StoreOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Measure a bundle under load, also against baselines, and keep the results in the store.

    Requests are timed from their intended arrival. Ctrl-C cancels the run and keeps the measurements so far.

    Example: stageline bench minilm.bundle --concurrency 1,2,4 --baseline onnxruntime
    """
    from stageline.runtime.bench.endpoint import Endpoint
    from stageline.runtime.bench.inputs import built_in_texts, make_items, read_texts
    from stageline.runtime.bench.runner import bench

    if lengths is not None and texts is not None:
        raise typer.BadParameter("give --texts or --lengths, not both", param_hint="--lengths")
    asked = options.loads(
        scenario.split(",") if scenario else (),
        server_rate,
        common.numbers(concurrency, "--concurrency", int),
        common.numbers(rate, "--rate", float),
        arrivals is not None,
    )
    bounds = options.slo(slo)
    given = options.lengths(lengths) if lengths else read_texts(texts) if texts else built_in_texts()
    recorded = options.arrivals(arrivals) if arrivals is not None else []
    opened = Bundle.open(hub.bundle_of(bundle))
    pipeline = PipelineOptions(engine, common.split(devices), threads, _QUEUE, quantise=quantise, slots=slots)
    output = _output_tokens(opened, new_tokens, rows)
    cache = pipeline.cache_size(opened.manifest)
    items, described = make_items(opened, given, rows, output, cache.capacity if cache else None, seed)
    settings = RunSettings(
        asked, repeats, seconds, warm_up, seed, described, rows, output, bounds, tuple(baseline or ()), pipeline
    )
    openers = _openers(opened, settings, checkpoint, partial(Endpoint, model=model, api_key=api_key))
    into = Store(store)
    run = options.new_run(opened, settings, run_id, name)
    into.begin(run)
    recorders: list[Recorder] = []
    with _stopped_by_signals() as stop, _progress(run) as follow:
        done = bench(
            run, into, openers, items, arrivals_s=recorded, stop=stop, follow=follow, recorded=recorders.append
        )
    if timeline is not None:
        _write_timeline(timeline, done, recorders)
    common.print_result(as_json, _plain(done), bench_show.run(done))
    raise typer.Exit(0 if done.status == "done" else 130)


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, help="Max runs to list.")] = 20,
    store: common.StoreOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """List the runs in the store, newest first.

    Example: stageline bench list
    """
    found = Store(store)
    lines = found.runs(limit)
    empty = f"no runs in {found.path}; make one with: stageline bench BUNDLE"
    common.print_result(as_json, list(map(asdict, lines)), bench_show.runs(lines) if lines else empty)


@app.command("show")
def show_command(
    run: RunArgument = "latest", store: common.StoreOption = None, as_json: common.JsonOption = False
) -> None:
    """Show a run: where it took place, and its measurements.

    Example: stageline bench show latest
    """
    found = Store(store)
    done = found.run(found.find(run))
    common.print_result(as_json, _plain(done), bench_show.run(done))


app.command("compare")(compare_command)


@app.command("export")
def export_command(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="File ending with .json, .csv or .parquet.")
    ],
    store: common.StoreOption = None,
) -> None:
    """Write a run to a file: JSON holds everything, CSV and Parquet are tables of its requests.

    Example: stageline bench export latest -o run.parquet
    """
    found = Store(store)
    files.save(files.read(found, found.find(run)), output)
    print(output)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `stageline bench export`.")],
    store: common.StoreOption = None,
) -> None:
    """Read an exported run into the store.

    Example: stageline bench import run.json
    """
    exported = files.load(file)
    Store(store).put(exported.run, exported.requests, exported.timelines)
    print(exported.run.id)


@app.command("cancel")
def cancel_command(run: RunArgument, store: common.StoreOption = None) -> None:
    """Ask the process of a run to stop; measurements so far are kept.

    Example: stageline bench cancel latest
    """
    found = Store(store)
    run_id = found.find(run)
    if not found.cancel(run_id):
        raise StagelineError(f"run {run_id} is not running; see stageline bench list")
    print(run_id)


@app.command("delete")
def delete_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The whole id.")], store: common.StoreOption = None
) -> None:
    """Remove a run and all its requests from the store.

    Example: stageline bench delete 20260131-235959-a1b2c3
    """
    Store(store).delete(run)
    print(run)


def _output_tokens(bundle: Bundle, new_tokens: int | None, rows: int) -> int | None:
    """Tokens to draw per request; None if the bundle does not generate. RequestError for options of the other kind."""
    if not bundle.manifest.cached and new_tokens is not None:
        raise RequestError("--new-tokens is for bundles that generate, and this one does not; leave it out")
    if bundle.manifest.cached and rows > 1:
        raise RequestError("--rows is for bundles that do not generate, and this one does; leave it out")
    return (new_tokens or _DEFAULT_NEW) if bundle.manifest.cached else None


def _openers(
    bundle: Bundle, settings: RunSettings, checkpoint: Path | None, endpoint: Callable[[str], Any]
) -> dict[str, Callable[[], Any]]:
    """The openers of all contenders, ours first. An unknown or incomplete baseline is a usage error."""
    from stageline.runtime.bench.baselines import onnxruntime_session, openvino_model
    from stageline.runtime.bench.contenders import PipelineContender
    from stageline.runtime.pipeline import Pipeline

    pipeline = settings.pipeline
    openers: dict[str, Callable[[], Any]] = {
        OURS: lambda: PipelineContender(OURS, Pipeline.open(bundle.path, pipeline))
    }
    for name in settings.baselines:
        if name.startswith(("http://", "https://")):
            openers[name] = partial(endpoint, name)
        elif name == "onnxruntime":
            openers[name] = partial(onnxruntime_session, bundle.path, pipeline)
        elif name == "openvino":
            openers[name] = partial(openvino_model, bundle.path, pipeline)
        elif name in ("torch", "torch-compile"):
            if checkpoint is None:
                raise typer.BadParameter(f"{name} needs the checkpoint: give --checkpoint", param_hint="--baseline")
            openers[name] = partial(_torch, name, hub.checkpoint_of(checkpoint), bundle, pipeline)
        else:
            known = ", ".join((*BASELINES, "a URL"))
            raise typer.BadParameter(f"unknown baseline {name!r}; known: {known}", param_hint="--baseline")
    return openers


def _torch(name: Any, checkpoint: Path, bundle: Bundle, pipeline: PipelineOptions) -> Any:
    with common.needs(f"baseline {name} needs torch", "export", "torch", "transformers"):
        from stageline.exporter.torch_baseline import torch_contender
    return torch_contender(name, checkpoint, bundle.manifest, pipeline.threads, pipeline.slots)


def _write_timeline(path: Path, run: Run, recorders: Sequence[Recorder]) -> None:
    from stageline.runtime.bench import perfetto

    spans = [span for recorder in recorders for span in recorder.spans()]
    requests = [request for recorder in recorders for request in recorder.requests()]
    perfetto.write(path, spans, requests, f"{run.id} {run.name}")


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one interrupts as usual."""
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
    """Progress on stderr: a bar on a terminal, otherwise one line per step."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    percentage, description = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}")
    with common.progress_bar(BarColumn(), percentage, TimeElapsedColumn(), description) as bar:
        if bar is None:
            print(f"run {run.id}", file=sys.stderr)
            last = [""]

            def line(progress: Progress) -> None:
                if progress.step != last[0]:
                    print(f"{progress.share:4.0%} {progress.step}", file=sys.stderr)
                    last[0] = progress.step

            yield line
            return
        task = bar.add_task("starting", total=1.0)

        def update(progress: Progress) -> None:
            speed = progress.live.get("requests_per_s")
            description = f"{progress.step}{f': {speed:.4g} requests/s' if speed is not None else ''}"
            bar.update(task, completed=progress.share, description=description)

        yield update


def _plain(run: Run) -> Any:
    return pydantic.TypeAdapter(Run).dump_python(run, mode="json")

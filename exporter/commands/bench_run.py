"""The command `stageline bench BUNDLE`: what to measure, as options, and the progress of a run."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from stageline.exporter.commands import bench_show, common, hub
from stageline.models.errors import RequestError
from stageline.runtime.bench import options
from stageline.runtime.bench.inputs import Prefixes, Shape
from stageline.runtime.bench.lengths import Lengths
from stageline.runtime.bench.records import OURS, Load, Progress, Quality, Run, RunSettings
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.recorder import Recorder

BASELINES = ("torch", "torch-compile", "onnxruntime", "openvino")
_QUEUE = 4096  # requests that may wait in the pipeline; those beyond wait in the load generator
_DEFAULT_NEW = 32
_REPEATS, _SWEEP_REPEATS = 3, 6


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
    rate: Annotated[str | None, typer.Option(metavar="R,R", help="Open loops at these rates, requests/s.")] = None,
    pattern: Annotated[
        str, typer.Option(metavar="NAME", help="Arrivals at a rate: poisson, constant, gamma:B, bursts:N, or ramp.")
    ] = "poisson",
    arrivals: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An open loop of recorded arrivals: seconds, or JSON with lengths, one per line."
        ),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(metavar="X", help="Factor for the times in --arrivals: 0.001 if they are milliseconds.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests unfinished at a time in --rate and --arrivals; others wait.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Search the knee, and the largest rate within --slo, also of the baselines.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds per repeat.")] = 5.0,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Repeats of each load (default: {_REPEATS}; --sweep: at most {_SWEEP_REPEATS}); intervals need two.",
        ),
    ] = None,
    warm_up: Annotated[float, typer.Option(min=0.1, help="Seconds of warm-up, once per contender.")] = 2.0,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one per line (default: built-in ones).")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS", help="Random tokens instead of texts: 64, 16-128, or normal:MEAN,DEVIATION,MIN-MAX."
        ),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines with prompt and output_tokens, or conversations as in ShareGPT."),
    ] = None,
    prefixes: Annotated[
        str | None, typer.Option(metavar="NxL", help="Begin each request with one of N prefixes of L random tokens.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of a conversation, each repeating what came before.")] = 1,
    turn_delay: Annotated[float, typer.Option(min=0, help="Seconds from an answer to the next turn.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Texts per request (models that do not generate).")] = 1,
    new_tokens: Annotated[
        str | None, typer.Option(metavar="LENGTHS", help=f"Tokens to draw per request (default: {_DEFAULT_NEW}).")
    ] = None,
    slo: Annotated[
        str, typer.Option(metavar="BOUNDS", help="Service level: ttft=200ms,tpot=50ms,latency=2s,share=90%.")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Also measure quality on texts, beside the bundle as it is not quantised.")
    ] = False,
    check_against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Measure quality beside this bundle, such as one in float32.")
    ] = None,
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
    error_budget: common.BudgetOption = None,
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
    from stageline.runtime.bench.arrivals import pattern as pattern_of
    from stageline.runtime.bench.arrivals import read_trace
    from stageline.runtime.bench.endpoint import Endpoint
    from stageline.runtime.bench.inputs import Maker, built_in_texts, read_texts
    from stageline.runtime.bench.runner import Recording, bench
    from stageline.runtime.bench.workload_file import read_workload

    _check_alone("--texts, --lengths and --workload", texts, lengths, workload)
    if sweep and (scenario or server_rate or concurrency or rate or arrivals):
        raise typer.BadParameter("a sweep chooses its loads; leave out other loads", param_hint="--sweep")
    if workload is not None and (prefixes is not None or turns > 1):
        raise typer.BadParameter("a workload has its own prefixes and turns", param_hint="--workload")
    at_a_rate = rate is not None or sweep
    _check_used("--pattern", pattern != "poisson", at_a_rate, "--rate or --sweep")
    _check_used(
        "--max-concurrency",
        max_concurrency is not None,
        at_a_rate or arrivals is not None,
        "--rate, --arrivals or --sweep",
    )
    _check_used("--time-scale", time_scale != 1.0, arrivals is not None, "--arrivals")
    _check_used("--turn-delay", turn_delay > 0, turns > 1 or workload is not None, "--turns or --workload")
    if timeline is not None and timeline.exists():
        raise RequestError(f"{timeline} exists already; delete it, or choose another file")
    at_rates = Load("Rate", pattern=pattern_of(pattern), ceiling=max_concurrency)
    asked = options.loads(
        scenario.split(",") if scenario else (),
        server_rate,
        common.numbers(concurrency, "--concurrency", int),
        common.numbers(rate, "--rate", float),
        arrivals is not None,
        at_rates,
    )
    bounds = options.slo(slo)
    given = (
        Lengths.parse(lengths) if lengths is not None
        else read_texts(texts) if texts is not None
        else read_workload(workload) if workload is not None
        else built_in_texts()
    )  # fmt: skip
    trace = read_trace(arrivals, time_scale) if arrivals is not None else None
    opened = Bundle.open(hub.bundle_of(bundle))
    output = None if new_tokens is None else Lengths.parse(new_tokens)
    shared = None if prefixes is None else Prefixes.parse(prefixes)
    shape = _shape(opened, Shape(rows, output, turns, turn_delay, shared))
    asked_for = PipelineOptions(engine, common.split(devices), threads, _QUEUE, quantise=quantise, slots=slots)
    pipeline = common.with_engine(opened.path, asked_for, error_budget)  # may measure: after the cheap checks
    cache = pipeline.cache_size(opened.manifest)
    maker = Maker(opened, shape, cache.capacity if cache else None, seed)
    items, described = maker.items(given)
    if trace is not None and arrivals is not None:
        lengths_too = ", with their lengths" if trace.lengths else ""
        described += f"; Recorded: {len(trace.times_s)} arrivals of {arrivals.name}{lengths_too}"
    recording = Recording(trace.times_s, maker.of_trace(trace.lengths)) if trace else Recording()
    settings = RunSettings(
        () if sweep else asked,
        repeats or (_SWEEP_REPEATS if sweep else _REPEATS),
        seconds,
        warm_up,
        seed,
        described,
        rows,
        None if shape.output_tokens is None else round(mean(item.output_tokens or 0 for item in items)),
        bounds,
        tuple(baseline or ()),
        pipeline,
        at_rates if sweep else None,
    )
    openers = _openers(opened, settings, checkpoint, partial(Endpoint, model=model, api_key=api_key))
    into = Store(store)
    run = options.new_run(opened, settings, run_id, name)
    if check or check_against is not None:
        read = read_texts(texts) if texts is not None else built_in_texts()
        run = replace(run, quality=_quality(opened, pipeline, check_against, read))
    into.begin(run)
    recorders: list[Recorder] = []
    with _stopped_by_signals() as stop, _progress(run) as follow:
        done = bench(
            run, into, openers, items, recording=recording, stop=stop, follow=follow, recorded=recorders.append
        )
    if timeline is not None:
        _write_timeline(timeline, done, recorders)
    common.print_result(as_json, bench_show.plain(done), bench_show.run(done))
    raise typer.Exit(0 if done.status == "done" else 130)


def _check_alone(names: str, *given: object) -> None:
    if sum(one is not None for one in given) > 1:
        raise typer.BadParameter(f"give one of {names}", param_hint=names.partition(",")[0])


def _quality(bundle: Bundle, pipeline: PipelineOptions, against: Path | None, texts: Sequence[str]) -> Quality:
    from stageline.runtime.bench.quality import Subject, check, reference_of

    reference = reference_of(bundle, pipeline, None if against is None else hub.bundle_of(against))
    with common.progress_steps() as say:
        return check(Subject(str(bundle.path), bundle.path, pipeline), reference, texts, say)


def _check_used(name: str, given: bool, used: bool, by: str) -> None:
    if given and not used:
        raise typer.BadParameter(f"it changes nothing without {by}; leave it out", param_hint=name)


def _shape(bundle: Bundle, asked: Shape) -> Shape:
    """What is asked, with the default of tokens to draw. RequestError for options of the other kind of model."""
    if bundle.manifest.cached:
        if asked.rows > 1:
            raise RequestError("--rows is for bundles that do not generate, and this one does; leave it out")
        return replace(asked, output_tokens=asked.output_tokens or Lengths(_DEFAULT_NEW, _DEFAULT_NEW))
    for name, value in (("--new-tokens", asked.output_tokens), ("--prefixes", asked.prefixes)):
        if value is not None:
            raise RequestError(f"{name} is for bundles that generate, and this one does not; leave it out")
    if asked.turns > 1:
        raise RequestError("--turns is for bundles that generate, and this one does not; leave it out")
    return asked


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

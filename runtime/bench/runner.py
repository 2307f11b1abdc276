"""A benchmark run: every contender under every load, repeat by repeat, stored as it proceeds.

Contenders take turns within a load (A B A B ...), because machines drift. All are opened first and warmed up once. The
speed in the warm-up sets the number of Offline requests, and the rate of a Server load that names none.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter

from stageline.models.errors import StagelineError
from stageline.runtime.bench import figures
from stageline.runtime.bench.arrivals import arrive
from stageline.runtime.bench.client import Client, DriveResult
from stageline.runtime.bench.contenders import Contender
from stageline.runtime.bench.energy import Meters
from stageline.runtime.bench.figures import StageUse
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.monitor import Monitor, series
from stageline.runtime.bench.records import (
    ANSWERED,
    OURS,
    Failures,
    Load,
    Measurement,
    Progress,
    Requests,
    Run,
    StageUsage,
    Timeline,
    ladder,
)
from stageline.runtime.bench.store import Store
from stageline.runtime.bench.sweep import Listed, Loads, Sweep
from stageline.runtime.stages.lanes import StageStats
from stageline.runtime.stages.recorder import Recorder

SERVER_SHARE = 0.7
"""The rate of a Server load that names none, as a share of the first contender's speed in the warm-up."""
FAR_OVER = 2.0
"""A rate of more than so many times a contender's speed in the warm-up lets its queue grow as long as requests arrive.
A repeat then ends `seconds` after the last arrival if most requests are unfinished (`Client.open_loop`)."""
MAX_SPANS = 20_000
"""Spans kept in the timeline of a measurement."""
_BEAT_S = 1.0
Openers = Mapping[str, Callable[[], Contender]]


@dataclass(frozen=True)
class Recording:
    """Arrivals of a Recorded load, in seconds, ascending, and the requests that arrive (none: those of other loads)."""

    times_s: Sequence[float] = ()
    items: Sequence[Item] = ()


def bench(
    run: Run,
    store: Store,
    openers: Openers,
    items: Sequence[Item],
    *,
    recording: Recording = Recording(),
    stop: threading.Event | None = None,
    follow: Callable[[Progress], None] = lambda progress: None,
    recorded: Callable[[Recorder], None] = lambda recorder: None,
) -> Run:
    """Carry out `run`, which is in the store already (`Store.begin`), and return it as stored at its end.

    `recording` is for a Recorded load. `stop` or `Store.cancel` ends the run early as cancelled. A failing contender
    ends it as failed, and its error is raised. Both keep what was measured. `recorded` receives the recorder of each
    load, `follow` the progress.
    """
    stop = stop or threading.Event()
    state = _State(run, store, stop, follow)
    try:
        with _Beating(state):
            _measure(run, state, openers, items, recording, recorded)
    except BaseException as error:
        with suppress(StagelineError):  # a store that failed already
            state.finish(str(error) if isinstance(error, StagelineError) else f"{type(error).__name__}: {error}")
        raise
    state.finish(None)
    return store.run(run.id)


@dataclass
class _State:
    """The progress of a run, and where it is reported."""

    run: Run
    store: Store
    stop: threading.Event
    follow: Callable[[Progress], None]
    progress: Progress = field(default_factory=Progress)
    done: int = 0
    total: int = 1
    trouble: StagelineError | None = None
    driven: tuple[Client, int, float] | None = None
    """The client that is driving, its answers before that, and when it began."""
    _moving: threading.Lock = field(default_factory=threading.Lock)
    """Held while the progress changes: the speed of a load is never reported as that of the next."""

    def at(self, step: str, live: Mapping[str, float]) -> None:
        """Report the current step; `live`: its latest figures."""
        with self._moving:
            self.progress = Progress(min(0.99, self.done / self.total), step, dict(live))
            self.follow(self.progress)

    def beat(self) -> None:
        """Write the progress into the store, with the current speed, and check whether the run is cancelled."""
        with self._moving:
            driven = self.driven  # another thread sets it
            if driven is not None:
                client, answered, since = driven
                speed = (client.answered - answered) / (perf_counter() - since)
                self.progress = replace(self.progress, live={**self.progress.live, "requests_per_s": speed})
                self.follow(self.progress)
        if self.store.progress(self.run.id, self.progress):
            self.stop.set()

    def finish(self, error: str | None) -> None:
        status = "failed" if error else "cancelled" if self.stop.is_set() else "done"
        self.progress = replace(self.progress, share=1.0 if status == "done" else self.progress.share, step=status)
        self.store.progress(self.run.id, self.progress)
        self.store.end(self.run.id, status, error)  # type: ignore[arg-type]
        self.follow(self.progress)


class _Beating:
    """A thread that beats every second while the block runs. A failing store stops the run with its error."""

    def __init__(self, state: _State) -> None:
        self._state, self._over = state, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._state.trouble is not None:
            raise self._state.trouble

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_S):
            try:
                self._state.beat()
            except StagelineError as error:
                self._state.trouble = error
                self._state.stop.set()
                return


@dataclass
class _Lap:
    """The repeats of a contender under one load, so far."""

    contender: Contender
    client: Client
    speed: float  # requests per second in the warm-up
    began_at: float
    recorder: Recorder | None
    answers: list[DriveResult] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    uses: list[StageUse] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def _measure(
    run: Run,
    state: _State,
    openers: Openers,
    items: Sequence[Item],
    recording: Recording,
    recorded: Callable[[Recorder], None],
) -> None:
    settings, meters = run.settings, Meters()
    contenders: list[Contender] = []
    try:
        for name, opener in openers.items():
            if state.stop.is_set():
                return
            state.at(f"opening {name}", {})
            contenders.append(opener())
        loads = _loads(run, [contender.name for contender in contenders])
        state.total = len(contenders) * (1 + loads.expected)
        bound_s = max(settings.slo.latency_s or 0.0, settings.slo.ttft_s or 0.0)
        clients = [Client(contender, items, state.stop, bound_s) for contender in contenders]
        speeds: list[float] = []
        for contender, client in zip(contenders, clients, strict=True):
            state.at(f"{contender.name}: warming up", {})
            speeds.append(
                _warm_up(client, settings.warm_up_s, settings.pipeline.slots if settings.output_tokens else 4)
            )
            state.done += 1
        for asked in loads:
            if state.stop.is_set():
                return
            load = asked
            if load.scenario == "Server" and load.rate_per_s is None:
                load = replace(load, rate_per_s=float(f"{SERVER_SHARE * speeds[0]:.3g}"))
            laps = [
                _lap(contender, client, speed)
                for contender, client, speed in zip(contenders, clients, speeds, strict=True)
            ]
            try:
                while pending := [lap for lap in laps if loads.again(asked, lap.contender.name)]:
                    for lap in pending:
                        if state.stop.is_set():
                            return
                        _repeat(lap, load, run, state, meters, recording)
                        if not state.stop.is_set():
                            loads.measured(asked, lap.contender.name, len(lap.answers[-1].requests), lap.figures[-1])
            finally:
                for lap in laps:
                    if lap.answers:
                        _store(lap, load, run, state, meters, recorded)
    finally:
        for contender in contenders:
            contender.close()
        meters.close()


def _loads(run: Run, contenders: Sequence[str]) -> Loads:
    settings = run.settings
    if settings.sweep is None:
        return Listed(settings)
    return Sweep(contenders, settings.sweep, settings.slo, settings.repeats, settings.seconds)


def _warm_up(client: Client, seconds: float, concurrency: int) -> float:
    """Requests per second that the contender answers, `concurrency` at a time."""
    answers = client.closed_loop(concurrency, seconds)
    return float((answers.requests.status == ANSWERED).sum()) / answers.seconds if answers.seconds else 0.0


def _lap(contender: Contender, client: Client, speed: float) -> _Lap:
    recorder = Recorder(MAX_SPANS) if contender.name == OURS and contender.pipeline is not None else None
    return _Lap(contender, client, speed, perf_counter(), recorder)


def _repeat(lap: _Lap, load: Load, run: Run, state: _State, meters: Meters, recording: Recording) -> None:
    settings, pipeline = run.settings, lap.contender.pipeline
    live = _live(lap.figures[-1]) if lap.figures else {}
    most = f"{'at most ' if settings.sweep else ''}{settings.repeats}"
    state.at(f"{lap.contender.name}: {load}, repeat {len(lap.answers) + 1} of {most}", live)
    if pipeline is not None:
        pipeline.record(lap.recorder)
    with Monitor(lap.contender, lap.client, meters, lap.began_at) as monitor:
        state.driven = lap.client, lap.client.answered, perf_counter()
        answers = _drive(lap, load, run, recording)
        state.driven = None
    if pipeline is not None:
        pipeline.record(None)
    cut_short = state.stop.is_set()
    if cut_short and (lap.answers or not (answers.requests.status == ANSWERED).any()):
        return  # an interrupted repeat counts only if there is no other
    found = {**figures.of_requests(answers, settings.rows, settings.slo), **monitor.figures}
    if monitor.use is not None:
        lap.uses.append(monitor.use)
        bubble = figures.bubble_ratio(monitor.use, figures.active_s(answers))
        if bubble is not None:
            found["bubble_ratio"] = bubble
    if lap.recorder is not None:
        hop = figures.hop_overhead_s([s for s in lap.recorder.spans() if s.began_s >= answers.began_at])
        if hop is not None:
            found["hop_overhead_s"] = hop
    good = answers.requests.status == ANSWERED
    tokens = int(answers.requests.tokens_in[good].sum()) + int(answers.requests.tokens_out[good].sum())
    if "energy_j" in found and tokens:
        found["energy_per_token_j"] = found["energy_j"] / tokens
    lap.answers.append(answers)
    lap.figures.append(found)
    lap.samples += monitor.samples
    state.done += 1
    state.at(state.progress.step, _live(found))


def _live(found: Mapping[str, float]) -> dict[str, float]:
    names = ("requests_per_s", "tokens_per_s", "latency_p50_s", "latency_p99_s", "ttft_p50_s", "tpot_p50_s")
    return {name: found[name] for name in names if name in found}


def _drive(lap: _Lap, load: Load, run: Run, recording: Recording) -> DriveResult:
    client, repeat, seconds = lap.client, len(lap.answers), run.settings.seconds
    if load.scenario in ("SingleStream", "Concurrency"):
        return client.closed_loop(load.concurrency or 1, seconds, repeat)
    if load.scenario == "Offline":
        return client.open_loop([0.0] * max(1, round(lap.speed * seconds)), repeat)
    if load.scenario == "Recorded":
        return client.open_loop(recording.times_s, repeat, load.ceiling, recording.items)
    assert load.rate_per_s is not None
    times_s = arrive(load.pattern, load.rate_per_s, seconds, run.settings.seed + repeat)
    far_over = load.rate_per_s > FAR_OVER * lap.speed
    return client.open_loop(times_s, repeat, load.ceiling, give_up_s=seconds if far_over else math.inf)


def _store(
    lap: _Lap,
    load: Load,
    run: Run,
    state: _State,
    meters: Meters,
    recorded: Callable[[Recorder], None],
) -> None:
    requests = Requests.join([answers.requests for answers in lap.answers])
    good = requests.status == ANSWERED
    ladders = {f"{name}_s": ladder(times) for name, times in figures.times_s(requests).items()}
    seconds = sum(answers.seconds for answers in lap.answers)
    notes = list(meters.notes)
    if lap.contender.pipeline is None:
        notes.append("no figures of stages, queue and bubbles: not a pipeline in this process")
    failures = _together(lap.answers)
    if not good.all():
        ways = "; ".join(f"{one.count} {one.kind}, such as: {one.sample}" for one in failures)
        name = lap.contender.name
        notes.append(f"{name}, {load}: {int((~good).sum())} of {len(requests)} requests were not answered: {ways}")
    measurement = Measurement(
        lap.contender.name,
        load,
        seconds,
        len(requests),
        figures.over_repeats(lap.figures),
        {name: values for name, values in ladders.items() if values},
        _stage_figures(lap, run, seconds),
        series(lap.samples),
        tuple(notes),
        failures,
    )
    state.store.add(run.id, measurement, requests, _timeline(lap))
    if lap.recorder is not None:
        recorded(lap.recorder)


def _together(answers: Sequence[DriveResult]) -> tuple[Failures, ...]:
    """The failures of all repeats, counted by kind, the most frequent first."""
    counts: dict[str, Failures] = {}
    for failures in (one for answer in answers for one in answer.failures):
        known = counts.get(failures.kind)
        counts[failures.kind] = replace(known, count=known.count + failures.count) if known else failures
    return tuple(sorted(counts.values(), key=lambda one: -one.count))


def _stage_figures(lap: _Lap, run: Run, seconds: float) -> tuple[StageUsage, ...]:
    if not lap.uses or lap.contender.pipeline is None:
        return ()
    stages = lap.contender.pipeline.stats().stages
    ours = len(run.plan.blocks) == len(stages)
    found = []
    for number, stage in enumerate(stages):
        busy_s = sum(use.busy_s[number] for use in lap.uses)
        copy_s = sum(use.copy_s[number] for use in lap.uses)
        blocks = run.plan.blocks[number] if ours else sum(run.plan.blocks)
        runs = sum(use.runs[number] for use in lap.uses)
        idle_s = max(0.0, seconds - busy_s - copy_s)
        found.append(StageUsage(number, blocks, device_name(stage), runs, busy_s, copy_s, idle_s))
    return tuple(found)


def device_name(stage: StageStats) -> str:
    """The device of a stage as lists show it: its cores, or the GPU's name."""
    return f"cpu:{','.join(map(str, stage.cores))}" if stage.device == "cpu" else stage.device


def _timeline(lap: _Lap) -> Timeline:
    """The recorded timeline, in seconds since the measurement began."""
    if lap.recorder is None:
        return Timeline()
    zero = lap.began_at
    spans, requests = lap.recorder.spans(), lap.recorder.requests()
    return Timeline(
        tuple(replace(span, began_s=span.began_s - zero, ended_s=span.ended_s - zero) for span in spans),
        tuple(replace(span, began_s=span.began_s - zero, ended_s=span.ended_s - zero) for span in requests),
    )

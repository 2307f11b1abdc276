"""The stages of a pipeline while open: for each a device, its engine, an inbox of work, and the worker that does it.

What is put into one inbox is done in the order it was put there, by the one thread that owns the engine. The work
itself hands on to the next stage: the lanes know nothing of batches, requests or tokens.

Stages on the same processors have one worker, which does first what is nearest to the end of the pipeline. Had each its
own thread, the system would switch between them in the midst of runs, and each one's busy time would count the others'.

On a GPU an engine's results are values that are not computed yet, and the worker goes on at once. What leaves the
pipeline is waited for by another thread of the lane, the one that lands it.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import Array, Device, HostCopy, Value
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines import Engine
from stageline.runtime.stages.recorder import RUN_KINDS, Kind, Recordable, Recorder

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class PipelineStage:
    """A stage to be opened: the names it reads and gives, and what opens its engine on its device."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: Callable[[Device], Engine]


@dataclass(frozen=True)
class Amount:
    """Work of one kind: `runs` of the engine, for `rows` in all, of `tokens` in all, padding of lengths included."""

    runs: int
    rows: int
    tokens: int

    def since(self, before: "Amount") -> "Amount":
        """What came after `before`."""
        return Amount(self.runs - before.runs, self.rows - before.rows, self.tokens - before.tokens)


@dataclass(frozen=True)
class StageStats:
    """What one stage did since the pipeline opened. `utilisation` is busy time over wall time, 0 to 1; `copy_s`, of
    copies between engines and cache rows, is no part of it. On a GPU `busy_s` is the device's own time, `cores` are
    those that feed it."""

    device: str
    cores: tuple[int, ...]
    runs: int
    busy_s: float
    copy_s: float
    utilisation: float
    amounts: Mapping[Kind, Amount]


@dataclass(slots=True, eq=False)
class Lane:
    """A stage while open. Only its worker counts, by `ran` and `copied`.

    `calls` is its worker's, which may have other lanes: True for each work in an inbox of theirs, False to end it.
    """

    number: int
    stage: PipelineStage
    device: Device
    calls: "SimpleQueue[bool]"
    inbox: "SimpleQueue[Work]" = field(default_factory=SimpleQueue)
    opened: "Future[None]" = field(default_factory=Future)
    runs: int = 0
    busy_s: float = 0.0
    copy_s: float = 0.0
    amounts: dict[Kind, list[int]] = field(default_factory=lambda: {kind: [0, 0, 0] for kind in RUN_KINDS})
    recorder: Recorder | None = None
    landing: "SimpleQueue[tuple[dict[str, HostCopy], dict[str, Array], Landed] | None]" = field(
        default_factory=SimpleQueue
    )
    lander: threading.Thread | None = None
    max_rows: int | None = None
    """Of a batch, for an engine that was built for no more; known once it is open."""

    def ran(self, began_s: float, work: Recordable) -> None:
        """The engine ran, from `began_s` (of `perf_counter`) until now."""
        ended_s = perf_counter()
        self.busy_s += ended_s - began_s
        self.runs += 1
        kind, rows, tokens, _ = work.traced()
        amount = self.amounts[kind]
        amount[0] += 1
        amount[1] += rows
        amount[2] += rows * tokens
        if self.recorder is not None:
            self.recorder.ran(self.number, began_s, ended_s, work)

    def copied(self, began_s: float, work: Recordable) -> None:
        """Something was copied for `work`, from `began_s` until now."""
        ended_s = perf_counter()
        self.copy_s += ended_s - began_s
        if self.recorder is not None:
            self.recorder.ran(self.number, began_s, ended_s, work, copying=True)

    def land(self, values: Mapping[str, Value], landed: "Landed") -> None:
        """Give `landed` the values as arrays in host memory, or the error that made them come to nothing: at once if
        they lie there, else when their copies are done, on the lane's landing thread. Only its worker calls this."""
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        if len(arrays) == len(values):
            landed(arrays)
            return
        copies = {name: value.read() for name, value in values.items() if not isinstance(value, np.ndarray)}
        if self.lander is None:
            self.lander = self.device.start_worker(f"landing-{self.number}", self._land)
        self.landing.put((copies, arrays, landed))

    def _land(self) -> None:
        for copies, arrays, landed in iter(self.landing.get, None):
            try:
                arrays |= {name: copy.wait() for name, copy in copies.items()}
            except BaseException as error:  # whoever waits is told, and the thread lives on
                landed(error)
            else:
                landed(arrays)
            del copies, arrays, landed  # or what they hold would live until the next ones come


Work = Callable[[Lane, Engine], None]
"""What a worker does with its engine. It does not raise: it tells whoever waits for it."""

Landed = Callable[[dict[str, Array] | BaseException], None]
"""What is done with values that left the pipeline. It does not raise either."""


class Lanes:
    """All stages of a pipeline, open until `close()`."""

    def __init__(
        self, stages: Sequence[PipelineStage], threads: int | None, devices: Sequence[str] | None = None
    ) -> None:
        """Open all stages, each on its own one of `devices`, by name (None: all on processors).

        Those on processors share `threads` of them (None: all this process may use). EngineError if an engine does not
        open, or a device is not there.
        """
        opened = open_devices(devices or ["cpu"] * len(stages), threads)
        calls: dict[object, SimpleQueue[bool]] = {}
        self._lanes = [
            Lane(number, stage, device, calls.setdefault(_place(number, device), SimpleQueue()))
            for number, (stage, device) in enumerate(zip(stages, opened, strict=True))
        ]
        self._calls = tuple(calls.values())
        self._lock = threading.Lock()  # guards the next line
        self._running = len(self._calls)
        self._workers = [self._started([lane for lane in self._lanes if lane.calls is one]) for one in self._calls]
        self._opened_at = perf_counter()
        self.recorder: Recorder | None = None
        try:
            for lane in self._lanes:
                lane.opened.result()
        except BaseException:
            self.close()
            raise
        self._opened_at = perf_counter()

    def __len__(self) -> int:
        return len(self._lanes)

    def put(self, stage: int, work: Work) -> None:
        """Queue work for a stage."""
        lane = self._lanes[stage]
        lane.inbox.put(work)
        lane.calls.put(True)

    def ask(self, stage: int, question: "Callable[[Engine], Answer]") -> "Future[Answer]":
        """Queue something to be done with a stage's engine; the future has what it gives or raises."""
        answer: Future[Answer] = Future()

        def work(lane: Lane, engine: Engine) -> None:
            try:
                answer.set_result(question(engine))
            except BaseException as error:
                answer.set_exception(error)

        self.put(stage, work)
        return answer

    @property
    def max_rows(self) -> int | None:
        """The largest batch that all engines take; None: any."""
        return min((lane.max_rows for lane in self._lanes if lane.max_rows is not None), default=None)

    @property
    def open_s(self) -> float:
        """Seconds since all stages are open."""
        return perf_counter() - self._opened_at

    def stats(self, open_s: float) -> tuple[StageStats, ...]:
        """A snapshot of each stage's counters, over a wall time of `open_s`."""
        return tuple(_stats(lane, open_s) for lane in self._lanes)

    def record(self, recorder: Recorder | None) -> None:
        """From now on tell `recorder`, which is borrowed, what each stage does (None: nobody)."""
        self.recorder = recorder
        for lane in self._lanes:
            lane.recorder = recorder

    def is_worker(self) -> bool:
        """Whether the caller is one of the workers, as a future's callback may be."""
        current = threading.current_thread()
        return current in self._workers or any(current is lane.lander for lane in self._lanes)

    def close(self) -> None:
        """Let each worker do what is queued already, then free engines and threads. May be called again.

        Returns when the workers have ended; a worker that calls it does not wait for itself.
        """
        for calls in self._calls:
            calls.put(False)
        if not self.is_worker():
            for worker in self._workers:
                worker.join()

    def _started(self, lanes: Sequence[Lane]) -> threading.Thread:
        name = "-".join(["stage", *(str(lane.number) for lane in lanes)])
        return lanes[0].device.start_worker(name, partial(self._serve, lanes))

    def _serve(self, lanes: Sequence[Lane]) -> None:
        """A worker's life. The last to end closes the devices: until then the others may read what lies on them."""
        _work(lanes)
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            for one in self._lanes:
                one.device.close()


def _stats(lane: Lane, open_s: float) -> StageStats:
    own_s = lane.device.busy_s()
    busy_s = lane.busy_s if own_s is None else own_s
    amounts = {kind: Amount(*counts) for kind, counts in lane.amounts.items()}
    return StageStats(lane.device.name, lane.device.cores, lane.runs, busy_s, lane.copy_s, busy_s / open_s, amounts)


def _place(number: int, device: Device) -> object:
    """What stages with one worker have in common: their processors. On a GPU each has a stream of its own."""
    return device.cores if isinstance(device, CpuDevice) else number


def _work(lanes: Sequence[Lane]) -> None:
    engines: list[tuple[Lane, Engine]] = []
    try:
        for lane in lanes:
            engine = lane.stage.open(lane.device)
            engines.append((lane, engine))
            lane.max_rows = engine.max_rows
            lane.opened.set_result(None)
    except BaseException as error:
        for lane in lanes:
            if not lane.opened.done():
                lane.opened.set_exception(error)
    else:
        for _ in iter(lanes[0].calls.get, False):
            lane, engine = next(one for one in reversed(engines) if not one[0].inbox.empty())
            work = lane.inbox.get()
            work(lane, engine)
            del work  # or what it holds would live until the next one comes
    for lane, engine in engines:
        if lane.lander is not None:
            lane.landing.put(None)
            lane.lander.join()
        engine.close()

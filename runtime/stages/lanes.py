"""The stages of a pipeline while open: for each a lane, with its device, its engine and an inbox of work.

Lanes on the same CPU cores share a worker, the thread that owns their engines. Work in one inbox is done in the order
it was put there; of several lanes the worker serves first the one nearest to the end of the pipeline. If each lane had
its own thread, the system would switch between them in the midst of runs, and each one's busy time would count the
others'. The work itself hands on to the next stage: the lanes know nothing of batches, requests or tokens.

On a GPU an engine's results are values that are not computed yet, and the worker continues at once. What leaves the
pipeline is waited for by another thread of the lane, its lander.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np
from stageline.runtime.cluster.elsewhere import Elsewhere
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import Array, Device, HostCopy, Value
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines import Engine, Sampler
from stageline.runtime.stages.recorder import RUN_KINDS, Kind, Recordable, Recorder

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class PipelineStage:
    """A stage to be opened: the names it reads and computes, and what opens its engine on its device."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: Callable[[Device], Engine]
    open_sampler: Callable[[Device], Sampler | None] | None = None
    """For the stage that computes logits."""


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
    copies between engines and cache rows, is not part of it. On a GPU `busy_s` is the device's own time (see
    `Device.busy_s`), `cores` are those that feed it."""

    device: str
    cores: tuple[int, ...]
    runs: int
    busy_s: float
    copy_s: float
    utilisation: float
    amounts: Mapping[Kind, Amount]


class Lander:
    """Brings values that leave the pipeline at one stage to host memory, on a thread of its own if it has to wait."""

    def __init__(self, device: Device, number: int) -> None:
        self._device, self._number = device, number
        self._landing: SimpleQueue[tuple[dict[str, HostCopy], dict[str, Array], Landed] | None] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def land(self, values: Mapping[str, Value], landed: "Landed") -> None:
        """Call `landed` with the values as arrays in host memory, or the error that made them come to nothing: at once
        if they lie there, else on the landing thread when their copies are done. For the lane's worker only."""
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        if len(arrays) == len(values):
            landed(arrays)
            return
        copies = {name: value.read() for name, value in values.items() if not isinstance(value, np.ndarray)}
        if self.thread is None:
            self.thread = self._device.start_worker(f"landing-{self._number}", self._land)
        self._landing.put((copies, arrays, landed))

    def close(self) -> None:
        """Land what is on its way, then end the thread. For the lane's worker only."""
        if self.thread is not None:
            self._landing.put(None)
            self.thread.join()

    def _land(self) -> None:
        for copies, arrays, landed in iter(self._landing.get, None):
            try:
                arrays |= {name: copy.wait() for name, copy in copies.items()}
            except BaseException as error:  # whoever waits gets it, and the thread lives on
                landed(error)
            else:
                landed(arrays)
            del copies, arrays, landed  # or what they hold would live until the next ones come


@dataclass(slots=True, eq=False)
class Lane:
    """A stage while open. Only its worker counts, by `ran` and `copied`."""

    number: int
    stage: PipelineStage
    device: Device
    lander: Lander
    inbox: "SimpleQueue[Work]" = field(default_factory=SimpleQueue)
    runs: int = 0
    busy_s: float = 0.0
    copy_s: float = 0.0
    amounts: dict[Kind, list[int]] = field(default_factory=lambda: {kind: [0, 0, 0] for kind in RUN_KINDS})
    recorder: Recorder | None = None
    max_rows: int | None = None
    """`Engine.max_rows`, once it is open."""
    packs: bool = False
    """`Engine.packs`, once it is open."""
    block_tokens: int | None = None
    """`Engine.block_tokens`, once it is open."""
    sampler: Sampler | None = None
    """Draws tokens on the stage's device, once it is open, if it can."""

    def ran(self, began_s: float, work: Recordable) -> float:
        """The engine ran, from `began_s` (of `perf_counter`) until now; how long that is."""
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
        return ended_s - began_s

    def copied(self, began_s: float, work: Recordable) -> None:
        """Something was copied for `work`, from `began_s` until now."""
        ended_s = perf_counter()
        self.copy_s += ended_s - began_s
        if self.recorder is not None:
            self.recorder.ran(self.number, began_s, ended_s, work, copying=True)

    def stats(self, open_s: float) -> StageStats:
        """A snapshot of its counters, over a wall time of `open_s`."""
        own_s = self.device.busy_s()
        busy_s = self.busy_s if own_s is None else own_s
        amounts = {kind: Amount(*counts) for kind, counts in self.amounts.items()}
        device = self.device
        return StageStats(device.name, device.cores, self.runs, busy_s, self.copy_s, busy_s / open_s, amounts)


Work = Callable[[Lane, Engine], None]
"""What a worker does with an engine. It does not raise: errors are for whoever waits for it."""

Landed = Callable[[dict[str, Array] | BaseException], None]
"""What is done with values that left the pipeline. It does not raise either."""


class Worker:
    """The thread of some lanes: it opens their engines, does what is put into their inboxes, and closes the engines.

    opening ──> working ──> ending      after `end`, when what was put before is done
       └── error: `opened` has it, ending
    """

    def __init__(self, lanes: Sequence[Lane], ended: Callable[[], None]) -> None:
        """`ended` is called on the thread, last of all."""
        self.opened: Future[None] = Future()
        self.lanes, self._ended = lanes, ended
        self._calls: SimpleQueue[Lane | None] = SimpleQueue()  # the lane of each work in an inbox; None: end
        name = "-".join(["stage", *(str(lane.number) for lane in lanes)])
        self._thread = lanes[0].device.start_worker(name, self._live)

    def put(self, lane: Lane, work: Work) -> None:
        """Queue work for one of its lanes."""
        lane.inbox.put(work)
        self._calls.put(lane)

    def end(self) -> None:
        """End the thread when what is queued already is done. May be called again."""
        self._calls.put(None)

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether its thread has not ended."""
        return self._thread.is_alive()

    def is_current(self) -> bool:
        """Whether the caller runs on its thread, or on one that lands values for it."""
        return threading.current_thread() in (self._thread, *(lane.lander.thread for lane in self.lanes))

    def _live(self) -> None:
        engines: list[tuple[Lane, Engine]] = []
        try:
            for lane in self.lanes:
                engines.append((lane, lane.stage.open(lane.device)))
                engine = engines[-1][1]
                lane.max_rows, lane.packs, lane.block_tokens = engine.max_rows, engine.packs, engine.block_tokens
                if lane.stage.open_sampler is not None:
                    lane.sampler = lane.stage.open_sampler(lane.device)
        except BaseException as error:
            self.opened.set_exception(error)
        else:
            self.opened.set_result(None)
            for _ in iter(self._calls.get, None):
                lane, engine = next(one for one in reversed(engines) if not one[0].inbox.empty())
                work = lane.inbox.get()
                work(lane, engine)
                del work  # or what it holds would live until the next one comes
        for lane, engine in engines:
            lane.lander.close()
            engine.close()
            if lane.sampler is not None:
                lane.sampler.close()
        self._ended()


class Lanes:
    """All stages of a pipeline, open until `close()`."""

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        threads: int | None,
        devices: Sequence[str] | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Open all stages, each on its own one of `devices`, by name (None: all on the CPU).

        Those on the CPU share `threads` cores (None: all this process may use); `elsewhere` says how those outside of
        this process are reached. EngineError if an engine does not open, or a device is not there.
        """
        opened = open_devices(devices or ["cpu"] * len(stages), threads, elsewhere)
        self._lanes = [
            Lane(number, stage, device, Lander(device, number))
            for number, (stage, device) in enumerate(zip(stages, opened, strict=True))
        ]
        shared: dict[object, list[Lane]] = {}
        for lane in self._lanes:
            shared.setdefault(_place(lane), []).append(lane)
        self._lock = threading.Lock()  # guards the next line
        self._running = len(shared)
        self._workers = [Worker(lanes, self._worker_ended) for lanes in shared.values()]
        self._worker_of = [next(w for w in self._workers if lane in w.lanes) for lane in self._lanes]
        self._opened_at = perf_counter()
        self.recorder: Recorder | None = None
        try:
            for worker in self._workers:
                worker.opened.result()
        except BaseException:
            self.close()
            raise
        self._opened_at = perf_counter()

    def __len__(self) -> int:
        return len(self._lanes)

    def put(self, stage: int, work: Work) -> None:
        """Queue work for a stage."""
        self._worker_of[stage].put(self._lanes[stage], work)

    def ask(self, stage: int, question: "Callable[[Engine], Answer]") -> "Future[Answer]":
        """Queue something to be done with a stage's engine; the future has what it returns or raises."""
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
    def packs(self) -> bool:
        """Whether all engines take packed tokens."""
        return all(lane.packs for lane in self._lanes)

    @property
    def block_tokens(self) -> int | None:
        """Tokens of a block, where all engines' caches are blocks of one size."""
        sizes = {lane.block_tokens for lane in self._lanes}
        return sizes.pop() if len(sizes) == 1 else None

    def draws(self, stage: int) -> bool:
        """Whether a stage's device draws tokens."""
        return self._lanes[stage].sampler is not None

    @property
    def on_gpus(self) -> bool:
        """Whether any stage is on a GPU."""
        return any(lane.device.name != "cpu" for lane in self._lanes)

    @property
    def places(self) -> int:
        """How many of the stages can compute at the same time: those on one GPU, or on the same cores, share it."""
        return len({lane.device.name if lane.device.name != "cpu" else lane.device.cores for lane in self._lanes})

    @property
    def step_tokens(self) -> int:
        """Tokens that are enough for a step (`Device.step_tokens`): of the device that needs fewest, the slowest."""
        return min(lane.device.step_tokens for lane in self._lanes)

    @property
    def open_s(self) -> float:
        """Seconds since all stages are open."""
        return perf_counter() - self._opened_at

    def stats(self, open_s: float) -> tuple[StageStats, ...]:
        """A snapshot of each stage's counters, over a wall time of `open_s`."""
        return tuple(lane.stats(open_s) for lane in self._lanes)

    def record(self, recorder: Recorder | None) -> None:
        """Report to `recorder`, which is borrowed, what each stage does from now on (None: to nobody)."""
        self.recorder = recorder
        for lane in self._lanes:
            lane.recorder = recorder

    @property
    def alive(self) -> bool:
        """Whether all workers live, as they do until `close` unless a bug has ended one."""
        return all(worker.alive for worker in self._workers)

    @property
    def lost(self) -> str | None:
        """Why nothing is computed any more, if a device is lost."""
        return next((lane.device.lost for lane in self._lanes if lane.device.lost is not None), None)

    def is_worker(self) -> bool:
        """Whether the caller is one of the workers, as a future's callback may be."""
        return any(worker.is_current() for worker in self._workers)

    def close(self) -> None:
        """Let each worker do what is queued already, then free engines and threads. May be called again.

        Returns when the workers have ended; a worker that calls it does not wait for itself.
        """
        for worker in self._workers:
            worker.end()
        if not self.is_worker():
            for worker in self._workers:
                worker.join()

    def _worker_ended(self) -> None:
        """The last to end closes the devices: until then the others may read what lies on them."""
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            for lane in self._lanes:
                lane.device.close()


def _place(lane: Lane) -> object:
    """What lanes with one worker have in common: their CPU cores. On a GPU each has a stream of its own."""
    return lane.device.cores if isinstance(lane.device, CpuDevice) else lane.number

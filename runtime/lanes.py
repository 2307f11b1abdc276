"""The stages of a pipeline while open: for each a worker thread on its own processors, its engine, an inbox of work.

What is put into one inbox is done in the order it was put there, by the one thread that owns the engine. The work
itself hands on to the next stage: the lanes know nothing of batches, requests or tokens.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from time import perf_counter

from stageline.runtime.devices.cpu import allowed_cores, share_cores, start_worker
from stageline.runtime.engines import Engine
from stageline.runtime.trace import Recorder, Traced


@dataclass(frozen=True)
class PipelineStage:
    """A stage to be opened: the names it reads and gives, and what opens its engine on the given processors."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: Callable[[tuple[int, ...]], Engine]


@dataclass(frozen=True)
class StageStats:
    """What one stage did since the pipeline opened. `utilisation` is busy time over wall time, 0 to 1; `copy_s`, of
    copies between engines and cache rows, is no part of it."""

    cores: tuple[int, ...]
    runs: int
    busy_s: float
    copy_s: float
    utilisation: float


@dataclass(slots=True, eq=False)
class Lane:
    """A stage while open. Only its worker counts, by `ran` and `copied`; None in the inbox ends the worker."""

    number: int
    stage: PipelineStage
    cores: tuple[int, ...]
    inbox: "SimpleQueue[Work | None]" = field(default_factory=SimpleQueue)
    opened: "Future[None]" = field(default_factory=Future)
    runs: int = 0
    busy_s: float = 0.0
    copy_s: float = 0.0
    recorder: Recorder | None = None

    def ran(self, began_s: float, work: Traced) -> None:
        """The engine ran, from `began_s` (of `perf_counter`) until now."""
        ended_s = perf_counter()
        self.busy_s += ended_s - began_s
        self.runs += 1
        if self.recorder is not None:
            self.recorder.ran(self.number, began_s, ended_s, work)

    def copied(self, began_s: float, work: Traced) -> None:
        """Something was copied for `work`, from `began_s` until now."""
        ended_s = perf_counter()
        self.copy_s += ended_s - began_s
        if self.recorder is not None:
            self.recorder.ran(self.number, began_s, ended_s, work, copying=True)


Work = Callable[[Lane, Engine], None]
"""What a worker does with its engine. It does not raise: it tells whoever waits for it."""


class Lanes:
    """All stages of a pipeline, open until `close()`."""

    def __init__(self, stages: Sequence[PipelineStage], threads: int | None) -> None:
        """Open all stages, each on its own thread, on `threads` processors in all (None: all this process may use).

        EngineError if an engine does not open.
        """
        shares = share_cores(len(stages), allowed_cores()[:threads])
        self._lanes = [Lane(i, stage, cores) for i, (stage, cores) in enumerate(zip(stages, shares, strict=True))]
        self._workers = [start_worker(f"stage-{lane.number}", lane.cores, partial(_work, lane)) for lane in self._lanes]
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
        self._lanes[stage].inbox.put(work)

    @property
    def open_s(self) -> float:
        """Seconds since all stages are open."""
        return perf_counter() - self._opened_at

    def stats(self, open_s: float) -> tuple[StageStats, ...]:
        """A snapshot of each stage's counters, over a wall time of `open_s`."""
        return tuple(
            StageStats(lane.cores, lane.runs, lane.busy_s, lane.copy_s, lane.busy_s / open_s) for lane in self._lanes
        )

    def record(self, recorder: Recorder | None) -> None:
        """From now on tell `recorder`, which is borrowed, what each stage does (None: nobody)."""
        self.recorder = recorder
        for lane in self._lanes:
            lane.recorder = recorder

    def is_worker(self) -> bool:
        """Whether the caller is one of the workers, as a future's callback may be."""
        return threading.current_thread() in self._workers

    def close(self) -> None:
        """Let each worker do what is queued already, then free engines and threads. May be called again.

        Returns when the workers have ended; a worker that calls it does not wait for itself.
        """
        for lane in self._lanes:
            lane.inbox.put(None)
        if not self.is_worker():
            for worker in self._workers:
                worker.join()


def _work(lane: Lane) -> None:
    try:
        engine = lane.stage.open(lane.cores)
    except BaseException as error:
        lane.opened.set_exception(error)
        return
    lane.opened.set_result(None)
    for work in iter(lane.inbox.get, None):
        work(lane, engine)
        del work  # or what it holds would live until the next one comes
    engine.close()

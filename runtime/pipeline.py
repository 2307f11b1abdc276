"""The pipeline: stages that run at the same time, each on its own worker thread, micro-batches moving through them.

The life of a request. `submit` and `arun` move it to waiting and queued; the worker of its first stage moves it to
running; its future is the record of how it ended, and whoever settles it first decides.

    checked ──> waiting for a slot ──> queued ──> running ──> done          all its micro-batches left the last stage
       │                │                 │          ├──────> failed        an engine raised in one of them
       │                │                 ├──────────┴──────> cancelled     its future was cancelled
       └─ RequestError  └─ QueueFullError └─────────────────> closed        the pipeline was closed (RequestError)

`_settle` is the one way out of the pipeline: it takes the request from the unsettled ones, so that nobody settles it
twice, and gives its slot back. A micro-batch of a settled request is dropped before the next stage starts on it.

Each stage has an inbox. A worker takes a micro-batch from its inbox, runs its engine on it and puts it into the inbox
of the next stage: it alone owns the micro-batch in between. At most WINDOW micro-batches for each stage are under way
between the first stage and the last, so that a slow stage does not gather the activations of the whole queue.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Self

from stageline.models.errors import EngineError, RequestError, StagelineError
from stageline.runtime.bundle import Bundle
from stageline.runtime.devices.cpu import allowed_cores, share_cores, start_worker
from stageline.runtime.engines import Array, Engine, StageFile, engine_factory
from stageline.runtime.manifest import TensorSpec
from stageline.runtime.microbatch import Piece, cut, join, take
from stageline.runtime.route import Step, route
from stageline.runtime.signature import Signature
from stageline.runtime.slots import Slots

WINDOW = 2  # micro-batches a stage: one that runs and one that is next


@dataclass(frozen=True)
class PipelineStage:
    """A stage to be opened: the names it reads and gives, and what opens its engine on the given processors."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: Callable[[tuple[int, ...]], Engine]


@dataclass(frozen=True)
class StageStats:
    """What one stage did since the pipeline opened. `utilisation` is busy time over wall time, 0 to 1."""

    cores: tuple[int, ...]
    runs: int
    busy_s: float
    utilisation: float


@dataclass(frozen=True)
class PipelineStats:
    """What a pipeline did since it opened. `in_flight` counts unfinished requests, those `queued` (no stage has started
    on them) included."""

    open_s: float
    stages: tuple[StageStats, ...]
    done: int
    failed: int  # engine errors, and requests that `close` cut off
    cancelled: int
    in_flight: int
    queued: int


@dataclass(slots=True, eq=False)
class _Request:
    """`parts` holds the outputs of each micro-batch; the worker of the last step alone writes it and counts `left`."""

    sizes: dict[str, int]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    pieces: list[Piece]
    parts: list[dict[str, Array]]
    left: int
    future: "Future[dict[str, Array]]" = field(default_factory=Future)
    started: bool = False


@dataclass(slots=True, eq=False)
class _MicroBatch:
    request: _Request
    number: int
    values: dict[str, Array]
    step: int = 0
    in_window: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """A stage while open. Only its worker writes `runs` and `busy_s`; None in the inbox ends the worker."""

    number: int
    stage: PipelineStage
    cores: tuple[int, ...]
    inbox: "SimpleQueue[_MicroBatch | None]" = field(default_factory=SimpleQueue)
    opened: "Future[None]" = field(default_factory=Future)
    runs: int = 0
    busy_s: float = 0.0


class Pipeline:
    """A model running as stages. Thread-safe; owns its worker threads and engines until `close()`.

        with Pipeline.open("bundle") as pipeline:
            outputs = pipeline.run({"input_ids": ids})  # ids: int64 [batch, length]

    A batch is cut into micro-batches of at most `micro_batch` rows (None: chosen from the batch and the number of
    stages); rows padded on the right lose their padding on the way, and outputs are zero there. `queue` bounds the
    requests that are not finished: with fewer than two a stage, stages idle.
    """

    def __init__(
        self,
        signature: Signature,
        stages: Sequence[PipelineStage],
        *,
        threads: int | None = None,
        queue: int = 64,
        micro_batch: int | None = None,
    ) -> None:
        """Open all stages, each on its own thread, on `threads` processors in all (None: all this process may use).

        EngineError if an engine does not open, BundleError if the stages do not give the outputs of `signature`.
        """
        for name, value in (("threads", threads), ("queue", queue), ("micro_batch", micro_batch)):
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        self.signature = signature
        self._micro_batch = micro_batch
        self._stage_names = [(stage.inputs, stage.outputs) for stage in stages]
        self._routes: dict[tuple[str, ...], tuple[Step, ...]] = {}
        self._route(signature.check_outputs(None))
        self._slots = Slots(queue)
        self._lock = threading.Lock()  # guards the next three lines
        self._unsettled: dict[Future[dict[str, Array]], _Request] = {}
        self._done = self._failed = self._cancelled = 0
        self._closed = False
        self._window: SimpleQueue[None] = SimpleQueue()
        for _ in range(WINDOW * len(stages)):
            self._window.put(None)
        shares = share_cores(len(stages), allowed_cores()[:threads])
        self._lanes = [_Lane(i, stage, cores) for i, (stage, cores) in enumerate(zip(stages, shares, strict=True))]
        self._workers = [
            start_worker(f"stage-{lane.number}", lane.cores, partial(self._work, lane)) for lane in self._lanes
        ]
        try:
            for lane in self._lanes:
                lane.opened.result()
        except BaseException:
            self.close()
            raise
        self._opened_at = perf_counter()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        engine: str = "onnxruntime",
        threads: int | None = None,
        queue: int = 64,
        micro_batch: int | None = None,
    ) -> Self:
        """Open a bundle. BundleError if it is missing or broken, EngineError if the engine is not there or refuses."""
        opened = Bundle.open(Path(bundle))
        factory = engine_factory(engine)
        stages = [
            PipelineStage(
                tuple(spec.name for spec in stage.inputs),
                tuple(spec.name for spec in stage.outputs),
                partial(factory, StageFile(number, opened.path / stage.file, opened.path, stage.caches)),
            )
            for number, stage in enumerate(opened.manifest.stages)
        ]
        signature = Signature.of(opened.manifest)
        return cls(signature, stages, threads=threads, queue=queue, micro_batch=micro_batch)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The named outputs (None: all) for these inputs, each of the shape and dtype the signature says.

        RequestError if they do not fit the signature, EngineError if a stage fails.
        """
        return self.submit(inputs, outputs).result()

    def submit(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        wait: bool = True,
        timeout: float | None = None,
    ) -> "Future[dict[str, Array]]":
        """Queue a request; its future gives what `run` returns. Do not change the arrays before it is done.

        Where the queue is full it waits, at most `timeout` seconds; QueueFullError after them, or at once without
        `wait`. RequestError is raised here, before anything is queued. Cancelling the future works until it is done.
        Its callbacks run on a stage's worker thread: keep them short.
        """
        request, batches = self._check(inputs, outputs)
        self._slots.take(wait, timeout)
        return self._enqueue(request, batches)

    async def arun(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """`run` for coroutines: waits for a free place and for the result without blocking the event loop.

        Cancelling the awaiting task cancels the request.
        """
        request, batches = self._check(inputs, outputs)
        await self._slots.take_async()
        return await asyncio.wrap_future(self._enqueue(request, batches))

    def stats(self) -> PipelineStats:
        """A snapshot of the counters since the pipeline opened."""
        with self._lock:
            open_s = perf_counter() - self._opened_at
            return PipelineStats(
                open_s,
                tuple(StageStats(lane.cores, lane.runs, lane.busy_s, lane.busy_s / open_s) for lane in self._lanes),
                self._done,
                self._failed,
                self._cancelled,
                len(self._unsettled),
                sum(not request.started for request in self._unsettled.values()),
            )

    def close(self) -> None:
        """Fail what is unfinished with RequestError, let each stage finish what it runs, and free engines and threads.

        May be called again, and from any thread; returns when the workers have ended (a worker, calling it from a
        future's callback, does not wait for itself).
        """
        with self._lock:
            first, self._closed = not self._closed, True
            unsettled = list(self._unsettled)
        if first:
            self._slots.close("the pipeline is closed")
            for future in unsettled:
                self._settle(future, RequestError("the pipeline was closed before this request was finished"))
            for lane in self._lanes:
                lane.inbox.put(None)
            self._window.put(None)  # for a first stage that waits while the others have ended already
        if threading.current_thread() not in self._workers:
            for worker in self._workers:
                worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Into the queue, on the submitter's thread.

    def _check(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> tuple[_Request, list[_MicroBatch]]:
        """A request that fits the signature, and its micro-batches."""
        names = self.signature.check_outputs(outputs)
        given, sizes = self.signature.check_inputs(inputs)
        pieces = cut(self.signature, given, sizes, len(self._lanes), self._micro_batch)
        specs = tuple(spec for spec in self.signature.outputs if spec.name in names)
        request = _Request(sizes, specs, self._route(names), pieces, [{} for _ in pieces], len(pieces))
        return request, [_MicroBatch(request, i, take(self.signature, given, piece)) for i, piece in enumerate(pieces)]

    def _route(self, outputs: tuple[str, ...]) -> tuple[Step, ...]:
        if outputs not in self._routes:
            inputs = [spec.name for spec in self.signature.graph_inputs]
            self._routes[outputs] = route(self._stage_names, inputs, outputs)
        return self._routes[outputs]

    def _enqueue(self, request: _Request, batches: list[_MicroBatch]) -> "Future[dict[str, Array]]":
        request.future.add_done_callback(self._drop_if_cancelled)
        with self._lock:
            if self._closed:
                raise RequestError("the pipeline is closed")
            self._unsettled[request.future] = request
            inbox = self._lanes[request.steps[0].stage].inbox
            for batch in batches:
                inbox.put(batch)
        return request.future

    # Through the stages, on their workers' threads.

    def _work(self, lane: _Lane) -> None:
        try:
            engine = lane.stage.open(lane.cores)
        except BaseException as error:
            lane.opened.set_exception(error)
            return
        lane.opened.set_result(None)
        for batch in iter(lane.inbox.get, None):
            self._advance(lane, engine, batch)
            del batch  # or it would live until the next one comes
        engine.close()

    def _advance(self, lane: _Lane, engine: Engine, batch: _MicroBatch) -> None:
        """Run a micro-batch through this stage, then hand it on or retire it."""
        if lane.number == 0:
            self._window.get()
            batch.in_window = True
        request = batch.request
        handed_on = False
        if not request.future.done():
            request.started = True
            try:
                handed_on = self._step(lane, engine, batch)
            except BaseException as error:  # whatever an engine raises, the worker lives on
                self._settle(request.future, _failure(lane, batch, error))
        if batch.in_window and not handed_on:
            self._window.put(None)

    def _step(self, lane: _Lane, engine: Engine, batch: _MicroBatch) -> bool:
        """Run the engine. True if the micro-batch went on to another stage; it is no longer ours then."""
        request = batch.request
        step = request.steps[batch.step]
        begin = perf_counter()
        outputs = engine.run(batch.values, step.fetch)
        lane.busy_s += perf_counter() - begin
        lane.runs += 1
        batch.values.update(outputs)
        batch.step += 1
        if batch.step < len(request.steps):
            batch.values = {name: value for name, value in batch.values.items() if name in step.keep}
            self._lanes[request.steps[batch.step].stage].inbox.put(batch)
            return True
        request.parts[batch.number] = {spec.name: batch.values[spec.name] for spec in request.outputs}
        request.left -= 1
        if request.left == 0:
            self._settle(request.future, join(request.outputs, request.sizes, request.pieces, request.parts))
        return False

    # Out of the pipeline, on any thread.

    def _settle(self, future: "Future[dict[str, Array]]", end: dict[str, Array] | StagelineError) -> None:
        """End a request with its outputs or its error, unless it has ended already; a cancelled one stays cancelled."""
        with self._lock:
            if self._unsettled.pop(future, None) is None:
                return
            alive = future.set_running_or_notify_cancel()
            self._cancelled += not alive
            self._failed += alive and isinstance(end, StagelineError)
            self._done += alive and not isinstance(end, StagelineError)
        self._slots.give_back()
        if not alive:
            return
        if isinstance(end, StagelineError):
            future.set_exception(end)
        else:
            future.set_result(end)

    def _drop_if_cancelled(self, future: "Future[dict[str, Array]]") -> None:
        if future.cancelled():
            self._settle(future, {})


def _failure(lane: _Lane, batch: _MicroBatch, error: BaseException) -> EngineError:
    """What the submitter is told: which stage, which micro-batch, and the first line of what it raised."""
    line = str(error).strip().split("\n", 1)[0] or type(error).__name__
    told = line if isinstance(error, EngineError) else f"stage {lane.number} failed: {type(error).__name__}: {line}"
    failure = EngineError(f"micro-batch {batch.number + 1} of {len(batch.request.pieces)}: {told}")
    failure.__cause__ = error
    return failure

"""Batches through the pipeline: each cut into micro-batches that follow each other through the stages.

The life of a request. `submit` and `arun` move it to waiting and queued; the worker of its first stage moves it to
running; its future is the record of how it ended, and whoever settles it first decides.

    checked ──> waiting for a slot ──> queued ──> running ──> done          all its micro-batches left the last stage
       │                │                 │          ├──────> failed        an engine raised in one of them
       │                │                 ├──────────┴──────> cancelled     its future was cancelled
       └─ RequestError  └─ QueueFullError └─────────────────> closed        the pipeline was closed (RequestError)

`_settle` is the one way out of the pipeline: it takes the request from the unsettled ones, so that nobody settles it
twice, and gives its slot back. A micro-batch of a settled request is dropped before the next stage starts on it.

Requests may go on to other lanes (`go_on`): those that were queued before finish on the lanes they began on. The lanes,
the routes through them and the window of a request are its `_Way`.

Each stage has an inbox. A worker takes a micro-batch from its inbox, runs its engine on it and puts it into the inbox
of the next stage: it alone owns the micro-batch in between. At most WINDOW micro-batches for each stage are under way
between the inbox of the first stage and the end of the last, so that a slow stage does not gather the activations of
the whole queue.
"""

import asyncio
import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from stageline.models.errors import EngineError, RequestError, StagelineError
from stageline.runtime.admission import Admission
from stageline.runtime.batching.micro_batch import RowSelection, cut, join, take
from stageline.runtime.batching.window import Window
from stageline.runtime.bundle.manifest import LENGTH, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, Engine, Value
from stageline.runtime.stages.lanes import Lane, Lanes, PipelineStage
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.stages.route import Hop, route

WINDOW = 2  # micro-batches a stage: one that runs and one that is next


@dataclass(frozen=True)
class BatchStats:
    """What became of the requests. `in_flight` counts unfinished ones, those `queued` (no stage has started on them)
    included."""

    done: int
    failed: int  # engine errors, and requests that `close` cut off
    cancelled: int
    in_flight: int
    queued: int


@dataclass(slots=True, eq=False)
class _Way:
    """Lanes that requests go through, `unsettled` of them now. `left` is done when none is there and none will come."""

    lanes: Lanes
    names: list[tuple[tuple[str, ...], tuple[str, ...]]]
    window: "Window[_MicroBatch]"
    routes: dict[tuple[str, ...], tuple[Hop, ...]] = field(default_factory=dict)
    unsettled: int = 0
    left: "Future[None] | None" = None

    def route(self, signature: Signature, outputs: tuple[str, ...]) -> tuple[Hop, ...]:
        if outputs not in self.routes:
            self.routes[outputs] = route(self.names, [spec.name for spec in signature.graph_inputs], outputs)
        return self.routes[outputs]


@dataclass(slots=True, eq=False)
class _Request:
    """`parts` holds the outputs of each micro-batch; the thread they land on alone writes it and counts `left`."""

    way: _Way
    sizes: dict[str, int]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Hop, ...]
    pieces: list[RowSelection]
    parts: list[dict[str, Array]]
    left: int
    future: "Future[dict[str, Array]]" = field(default_factory=Future)
    started: bool = False
    number: int = 0
    submitted_s: float = 0.0


@dataclass(slots=True, eq=False)
class _MicroBatch:
    """`piece` says which of the request's; `number` counts all micro-batches of the pipeline."""

    request: _Request
    piece: int
    values: Mapping[str, Value]
    number: int = 0
    step: int = 0
    in_window: bool = False

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        piece = self.request.pieces[self.piece]
        rows = piece.rows.stop - piece.rows.start if isinstance(piece.rows, slice) else len(piece.rows)
        return "batch", rows, piece.length or self.request.sizes.get(LENGTH, 1), (self.request.number,)


class Batches:
    """Requests of whole batches on open lanes, which it borrows. `queue` bounds the requests that are not finished,
    `micro_batch` the rows of a micro-batch (None: chosen from the batch and the number of stages)."""

    def __init__(
        self,
        signature: Signature,
        stages: Sequence[PipelineStage],
        lanes: Lanes,
        queue: int,
        micro_batch: int | None,
    ) -> None:
        self.signature = signature
        self._way = self._through(lanes, stages)
        self._micro_batch = micro_batch
        self._slots = Admission(queue)
        self._lock = threading.Lock()  # guards the next three lines, and the way
        self._unsettled: dict[Future[dict[str, Array]], _Request] = {}
        self._done = self._failed = self._cancelled = 0
        self._closed = False
        self._request_numbers, self._batch_numbers = itertools.count(), itertools.count()

    def submit(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, wait: bool, timeout: float | None
    ) -> "Future[dict[str, Array]]":
        """See `Pipeline.submit`."""
        checked = self._check(inputs, outputs)
        self._slots.take(wait, timeout)
        return self._enqueue(*checked)

    async def arun(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
        """See `Pipeline.arun`."""
        checked = self._check(inputs, outputs)
        await self._slots.take_async()
        return await asyncio.wrap_future(self._enqueue(*checked))

    def go_on(self, lanes: Lanes, stages: Sequence[PipelineStage]) -> "Future[None]":
        """Queue requests on other lanes from now on. Done when the last one has left the lanes so far, which may then
        be closed."""
        left: Future[None] = Future()
        with self._lock:
            old, self._way = self._way, self._through(lanes, stages)
            old.left, empty = left, not old.unsettled
        if empty:
            _leave(old)
        return left

    def stats(self) -> BatchStats:
        """A snapshot of the counters."""
        with self._lock:
            queued = sum(not request.started for request in self._unsettled.values())
            return BatchStats(self._done, self._failed, self._cancelled, len(self._unsettled), queued)

    def close(self) -> None:
        """Fail what is unfinished with RequestError. The lanes are closed afterwards. May be called again."""
        with self._lock:
            first, self._closed = not self._closed, True
            unsettled = list(self._unsettled)
        if first:
            self._slots.close("the pipeline is closed")
            for future in unsettled:
                self._settle(future, RequestError("the pipeline was closed before this request was finished"))

    # Into the queue, on the submitter's thread.

    def _check(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None
    ) -> tuple[tuple[str, ...], dict[str, Array], dict[str, int]]:
        """What fits the signature: names of outputs, inputs, sizes of free dimensions."""
        return self.signature.check_outputs(outputs), *self.signature.check_inputs(inputs)

    def _enqueue(
        self, outputs: tuple[str, ...], inputs: dict[str, Array], sizes: dict[str, int]
    ) -> "Future[dict[str, Array]]":
        submitted_s = perf_counter()
        while True:
            way = self._way
            request, batches = self._cut(way, outputs, inputs, sizes)
            with self._lock:
                if self._closed:
                    raise RequestError("the pipeline is closed")
                if way is not self._way:  # it has just gone on
                    continue
                way.unsettled += 1
                self._unsettled[request.future] = request
                request.number, request.submitted_s = next(self._request_numbers), submitted_s
                for batch in batches:
                    batch.number = next(self._batch_numbers)
                    batch.in_window = request.steps[0].stage == 0
                    if batch.in_window:
                        way.window.enter(batch)
                    else:
                        self._put(request.steps[0].stage, batch)
                break
        # Last, since it is called at once where the future is done.
        request.future.add_done_callback(self._drop_if_cancelled)
        return request.future

    def _cut(
        self, way: _Way, outputs: tuple[str, ...], inputs: dict[str, Array], sizes: dict[str, int]
    ) -> tuple[_Request, list[_MicroBatch]]:
        pieces = cut(self.signature, inputs, sizes, len(way.lanes), self._micro_batch, way.lanes.most_rows)
        specs = tuple(spec for spec in self.signature.outputs if spec.name in outputs)
        steps = way.route(self.signature, outputs)
        request = _Request(way, sizes, specs, steps, pieces, [{} for _ in pieces], len(pieces))
        return request, [_MicroBatch(request, i, take(self.signature, inputs, piece)) for i, piece in enumerate(pieces)]

    # Through the stages, on their workers' threads.

    def _through(self, lanes: Lanes, stages: Sequence[PipelineStage]) -> _Way:
        names = [(stage.inputs, stage.outputs) for stage in stages]
        return _Way(lanes, names, Window(WINDOW * len(stages), partial(self._put, 0)))

    def _put(self, stage: int, batch: _MicroBatch) -> None:
        batch.request.way.lanes.put(stage, partial(self._advance, batch))

    def _advance(self, batch: _MicroBatch, lane: Lane, engine: Engine) -> None:
        """Run a micro-batch through this stage, then hand it on or retire it."""
        request = batch.request
        handed_on = False
        if not request.future.done():
            request.started = True
            try:
                handed_on = self._step(lane, engine, batch)
            except BaseException as error:  # whatever an engine raises, the worker lives on
                self._settle(request.future, _failure(lane, batch, error))
        if batch.in_window and not handed_on:
            request.way.window.leave()

    def _step(self, lane: Lane, engine: Engine, batch: _MicroBatch) -> bool:
        """Run the engine. True if the micro-batch went on, to another stage or to land; it is no longer ours then."""
        request = batch.request
        step = request.steps[batch.step]
        began = perf_counter()
        outputs = engine.run(batch.values, step.fetch)
        lane.ran(began, batch)
        batch.values = {**batch.values, **outputs}
        batch.step += 1
        if batch.step < len(request.steps):
            batch.values = {name: value for name, value in batch.values.items() if name in step.keep}
            self._put(request.steps[batch.step].stage, batch)
            return True
        lane.land({spec.name: batch.values[spec.name] for spec in request.outputs}, partial(self._landed, lane, batch))
        return True

    # Out of the pipeline, on any thread.

    def _landed(self, lane: Lane, batch: _MicroBatch, outputs: dict[str, Array] | BaseException) -> None:
        """The outputs of a micro-batch are in host memory, or never will be."""
        request = batch.request
        try:
            if isinstance(outputs, BaseException):
                raise outputs
            request.parts[batch.piece] = outputs
            request.left -= 1
            if request.left == 0:
                self._settle(request.future, join(request.outputs, request.sizes, request.pieces, request.parts))
        except BaseException as error:
            self._settle(request.future, _failure(lane, batch, error))
        if batch.in_window:
            request.way.window.leave()

    def _settle(self, future: "Future[dict[str, Array]]", end: dict[str, Array] | StagelineError) -> None:
        """End a request with its outputs or its error, unless it has ended already; a cancelled one stays cancelled."""
        with self._lock:
            request = self._unsettled.pop(future, None)
            if request is None:
                return
            alive = future.set_running_or_notify_cancel()
            self._cancelled += not alive
            self._failed += alive and isinstance(end, StagelineError)
            self._done += alive and not isinstance(end, StagelineError)
            way = request.way
            way.unsettled -= 1
            last = way.left is not None and not way.unsettled
        self._slots.give_back()
        if way.lanes.recorder is not None:
            way.lanes.recorder.ended(request.number, request.submitted_s, perf_counter())
        if not alive:
            pass
        elif isinstance(end, StagelineError):
            future.set_exception(end)
        else:
            future.set_result(end)
        if last:
            _leave(way)

    def _drop_if_cancelled(self, future: "Future[dict[str, Array]]") -> None:
        if future.cancelled():
            self._settle(future, {})


def _leave(way: _Way) -> None:
    assert way.left is not None
    way.left.set_result(None)


def _failure(lane: Lane, batch: _MicroBatch, error: BaseException) -> EngineError:
    """What the submitter is told: which stage, which micro-batch, and the first line of what it raised."""
    line = str(error).strip().split("\n", 1)[0] or type(error).__name__
    told = line if isinstance(error, EngineError) else f"stage {lane.number} failed: {type(error).__name__}: {line}"
    failure = EngineError(f"micro-batch {batch.piece + 1} of {len(batch.request.pieces)}: {told}")
    failure.__cause__ = error
    return failure

"""Batches through the pipeline: each cut into micro-batches that follow each other through the stages.

The life of a request. `submit` and `arun` move it to waiting and queued; the worker of its first stage moves it to
running; its future is the record of how it ended, and whoever settles it first decides.

    checked ──> waiting for a permit ──> queued ──> running ──> done          all its micro-batches left the last stage
       │                │                   │          ├──────> failed        an engine raised in one of them
       │                │                   ├──────────┴──────> cancelled     its future was cancelled
       └─ RequestError  └─ QueueFullError   └─────────────────> closed        the pipeline was closed (RequestError)

`_settle` is the one way out of the pipeline: it takes the request from the unsettled ones, so that nobody settles it
twice, and gives its permit back. A micro-batch of a settled request is dropped before the next stage starts on it.

Requests may switch to other lanes (`switch`): those that were queued before finish on the lanes they began on. The
lanes, the routes through them and the window of a request are its `_Track`.

At most WINDOW micro-batches per stage are between the inbox of the first stage and the end of the last, so that a slow
stage does not gather the activations of the whole queue.
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from time import perf_counter

from stageline.models.errors import EngineError, RequestError, StagelineError, StageLostError
from stageline.runtime.admission import Admission
from stageline.runtime.batching.micro_batch import RowSelection, join, split, take
from stageline.runtime.batching.window import Window
from stageline.runtime.bundle.manifest import LENGTH, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, Engine, Value
from stageline.runtime.stages.lanes import Lane, Lanes, PipelineStage
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.stages.route import Hop, route
from stageline.runtime.stages.trip import Trip
from stageline.runtime.times import Histogram, Tally

WINDOW = 2  # micro-batches a stage: one that runs and one that is next


@dataclass(frozen=True)
class BatchStats:
    """What became of the requests. `in_flight` counts unfinished ones, those `queued` (no stage has started on them)
    included. `latency`: the times of those that are done, from submission."""

    done: int
    failed: int  # engine errors, and requests that `close` cut off
    cancelled: int
    in_flight: int
    queued: int
    latency: Histogram


@dataclass(slots=True, eq=False)
class _Track:
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

    track: _Track
    sizes: dict[str, int]
    outputs: tuple[TensorSpec, ...]
    pieces: list[RowSelection]
    parts: list[dict[str, Array]]
    left: int
    future: "Future[dict[str, Array]]" = field(default_factory=Future)
    started: bool = False
    number: int = 0
    submitted_s: float = 0.0
    inputs: dict[str, Array] = field(default_factory=dict)
    """All of it, to begin again."""
    held: bool = False
    """Whether a stage was lost under it: it is of no track, and begins again on other lanes."""


@dataclass(eq=False)
class _MicroBatch(Trip):
    """`piece` is its place in the request; `number` counts all micro-batches of the pipeline. `values` are the model's
    inputs, each [rows, ...] of its rows alone, then what the stages made of them."""

    request: _Request
    piece: int
    done: "Callable[[_MicroBatch, Lane, dict[str, Array] | EngineError], None]"
    in_window: bool = False

    def visit(self, lane: Lane, engine: Engine) -> None:
        if self.request.future.done():
            raise CancelledError  # nobody waits for it
        self.request.started = True

    def run(self, engine: Engine, fetch: Sequence[str]) -> Mapping[str, Value]:
        return engine.run(self.values, fetch)

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        piece = self.request.pieces[self.piece]
        rows = piece.rows.stop - piece.rows.start if isinstance(piece.rows, slice) else len(piece.rows)
        return "batch", rows, piece.length or self.request.sizes.get(LENGTH, 1), (self.request.number,)

    def failure(self, lane: Lane, error: BaseException) -> EngineError:
        """Which stage, which micro-batch, and the first line of what it raised; a lost stage is the same for all."""
        if isinstance(error, StageLostError):
            return error
        line = str(error).strip().split("\n", 1)[0] or type(error).__name__
        what = line if isinstance(error, EngineError) else f"stage {lane.number} failed: {type(error).__name__}: {line}"
        failure = EngineError(f"micro-batch {self.piece + 1} of {len(self.request.pieces)}: {what}")
        failure.__cause__ = error
        return failure

    def landed(self, lane: Lane, outcome: dict[str, Array] | EngineError) -> None:
        self.done(self, lane, outcome)


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
        self._track = _track(lanes, stages)
        self._micro_batch = micro_batch
        self._admission = Admission(queue)
        self._lock = threading.Lock()  # guards the rest, and the tracks
        self._unsettled: dict[Future[dict[str, Array]], _Request] = {}
        self._done = self._failed = self._cancelled = 0
        self._latencies = Tally()
        self._closed = False
        self._request_numbers, self._batch_numbers = itertools.count(), itertools.count()
        self.waits_for_lost = False
        """Whether requests wait for other lanes where a stage of theirs is lost, and do not fail."""

    def submit(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, wait: bool, timeout: float | None
    ) -> "Future[dict[str, Array]]":
        """See `Pipeline.submit`."""
        checked = self._check(inputs, outputs)
        self._admission.take(wait, timeout)
        return self._enqueue(*checked)

    async def arun(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
        """See `Pipeline.arun`."""
        checked = self._check(inputs, outputs)
        await self._admission.take_async()
        return await asyncio.wrap_future(self._enqueue(*checked))

    def switch(self, lanes: Lanes, stages: Sequence[PipelineStage]) -> "Future[None]":
        """Queue requests on other lanes from now on. Done when the last one has left the old lanes, which may then be
        closed."""
        left: Future[None] = Future()
        with self._lock:
            old, self._track = self._track, _track(lanes, stages)
            old.left, empty = left, not old.unsettled
            held = [request for request in self._unsettled.values() if request.held]
        for request in held:
            self._begin_again(request)
        if empty:
            _leave(old)
        return left

    def give_up(self, error: StagelineError) -> None:
        """There will be no others for the stages that are lost: fail what waits for them, and what comes."""
        with self._lock:
            self.waits_for_lost = False
            held = [request.future for request in self._unsettled.values() if request.held]
        for future in held:
            self._settle(future, error)

    def stats(self) -> BatchStats:
        """A snapshot of the counters."""
        with self._lock:
            queued = sum(not request.started for request in self._unsettled.values())
            return BatchStats(
                self._done, self._failed, self._cancelled, len(self._unsettled), queued, self._latencies.histogram()
            )

    def close(self) -> None:
        """Fail what is unfinished with RequestError. The lanes are closed afterwards. May be called again."""
        with self._lock:
            first, self._closed = not self._closed, True
            unsettled = list(self._unsettled)
        if first:
            self._admission.close("the pipeline is closed")
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
        """`inputs` by name, each [batch, ...] of the whole request; `sizes` of its free dimensions by name."""
        submitted_s = perf_counter()
        while True:
            track = self._track
            request, batches = self._cut(track, outputs, inputs, sizes)
            with self._lock:
                if self._closed:
                    raise RequestError("the pipeline is closed")
                if track is not self._track:  # it has just switched
                    continue
                request.number, request.submitted_s = next(self._request_numbers), submitted_s
                self._start(request, batches)
                break
        # Last, since it is called at once where the future is done.
        request.future.add_done_callback(self._drop_if_cancelled)
        return request.future

    def _begin_again(self, held: _Request) -> None:
        """Queue a request that was held on the present lanes, unless it has ended."""
        outputs = tuple(spec.name for spec in held.outputs)
        while True:
            track = self._track
            request, batches = self._cut(track, outputs, held.inputs, held.sizes)
            with self._lock:
                if self._unsettled.get(held.future) is not held:
                    return
                if track is not self._track:
                    continue
                request.future, request.number, request.submitted_s = held.future, held.number, held.submitted_s
                self._start(request, batches)
                return

    def _start(self, request: _Request, batches: Sequence[_MicroBatch]) -> None:
        """Let it go through its lanes. With the lock."""
        request.track.unsettled += 1
        self._unsettled[request.future] = request
        for batch in batches:
            batch.number = next(self._batch_numbers)
            batch.in_window = batch.hops[0].stage == 0
            if batch.in_window:
                request.track.window.enter(batch)
            else:
                batch.start()

    def _cut(
        self, track: _Track, outputs: tuple[str, ...], inputs: dict[str, Array], sizes: dict[str, int]
    ) -> tuple[_Request, list[_MicroBatch]]:
        lanes = track.lanes
        pieces = split(
            self.signature, inputs, sizes, lanes.places, self._micro_batch, lanes.max_rows, lanes.step_tokens
        )
        specs = tuple(spec for spec in self.signature.outputs if spec.name in outputs)
        hops = track.route(self.signature, outputs)
        request = _Request(track, sizes, specs, pieces, [{} for _ in pieces], len(pieces), inputs=inputs)
        return request, [
            _MicroBatch(track.lanes, hops, take(self.signature, inputs, piece), 0, request, place, self._landed)
            for place, piece in enumerate(pieces)
        ]

    # Out of the pipeline, on any thread.

    def _landed(self, batch: _MicroBatch, lane: Lane, outcome: dict[str, Array] | EngineError) -> None:
        """The outputs of a micro-batch are in host memory, or never will be."""
        request = batch.request
        try:
            if request.held:
                pass  # it begins again elsewhere
            elif isinstance(outcome, StageLostError) and self.waits_for_lost:
                self._hold(request)
            elif isinstance(outcome, EngineError):
                self._settle(request.future, outcome)
            else:
                request.parts[batch.piece] = outcome
                request.left -= 1
                if request.left == 0:
                    self._settle(request.future, join(request.outputs, request.sizes, request.pieces, request.parts))
        except BaseException as error:
            self._settle(request.future, batch.failure(lane, error))
        if batch.in_window:
            request.track.window.leave()

    def _hold(self, request: _Request) -> None:
        """Let a request wait for other lanes, or go to those that are there already."""
        with self._lock:
            if self._unsettled.get(request.future) is not request:
                return
            request.held = True
            track = request.track
            track.unsettled -= 1
            switched, last = track is not self._track, track.left is not None and not track.unsettled
        if switched:
            self._begin_again(request)
        if last:
            _leave(track)

    def _settle(self, future: "Future[dict[str, Array]]", end: dict[str, Array] | StagelineError) -> None:
        """End a request with its outputs or its error, unless it has ended already; a cancelled one stays cancelled."""
        with self._lock:
            request = self._unsettled.pop(future, None)
            if request is None:
                return
            alive = future.set_running_or_notify_cancel()
            self._cancelled += not alive
            self._failed += alive and isinstance(end, StagelineError)
            if alive and not isinstance(end, StagelineError):
                self._done += 1
                self._latencies.add(perf_counter() - request.submitted_s)
            track = request.track
            track.unsettled -= not request.held
            last = not request.held and track.left is not None and not track.unsettled
        self._admission.give_back()
        if track.lanes.recorder is not None:
            track.lanes.recorder.ended(request.number, request.submitted_s, perf_counter())
        if not alive:
            pass
        elif isinstance(end, StagelineError):
            future.set_exception(end)
        else:
            future.set_result(end)
        if last:
            _leave(track)

    def _drop_if_cancelled(self, future: "Future[dict[str, Array]]") -> None:
        if future.cancelled():
            self._settle(future, {})


def _track(lanes: Lanes, stages: Sequence[PipelineStage]) -> _Track:
    return _Track(lanes, [(stage.inputs, stage.outputs) for stage in stages], Window(WINDOW * len(stages), Trip.start))


def _leave(track: _Track) -> None:
    assert track.left is not None
    track.left.set_result(None)

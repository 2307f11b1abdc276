"""The lanes that serve, with batches and generation on them, and their exchange for others while they do.

A switch opens the new lanes beside the old ones, lets batches go on there, changes generation over between two steps,
and closes the old lanes when nothing is left on them. Until generation has changed over everything can go back: a
switch that fails leaves the old lanes serving. Switches are made one after the other, on their callers' threads.

    opening ──> batches go on ──> the last batch has left ──> generation goes on ──> old lanes closed
       │                                                          │
       └── EngineError: new lanes closed                          └── error: batches go back, new lanes closed
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from stageline.models.errors import RequestError
from stageline.runtime.batching.batches import Batches
from stageline.runtime.bundle.manifest import CACHED_INPUTS
from stageline.runtime.generation.generator import Generator
from stageline.runtime.stages.lanes import Lanes
from stageline.runtime.stages.opening import StageSet
from stageline.runtime.stages.recorder import Recorder
from stageline.runtime.stages.route import Hop, route


@dataclass(frozen=True)
class Switched:
    """How long a switch took: `open_s` to open the new stages while the old ones served, and `pause_s` in which no step
    of generation was issued (requests that had not begun waited, where caches were not kept)."""

    open_s: float
    pause_s: float


class Executor:
    """Owns lanes, batches and generator until `close()`. `cut` is what the lanes were opened from."""

    def __init__(self, lanes: Lanes, cut: StageSet, batches: Batches) -> None:
        self.lanes, self.cut, self.batches = lanes, cut, batches
        self.generator: Generator | None = None
        self.switches = 0
        self.last: Switched | None = None
        self.closed = False
        self.earlier_s = 0.0
        """Seconds that the pipeline was open before these lanes were."""
        self._one = threading.Lock()  # held by whoever switches
        self._state = threading.Lock()  # guards `closed` and `_new`
        self._new: Lanes | None = None  # beside the others, while switching

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for switches under way; nobody else switches in this context. RequestError where that cannot be."""
        if self.is_own_thread():
            raise RequestError(
                "stages cannot be exchanged by a callback on one of the pipeline's threads: it would wait for itself; "
                "use another thread"
            )
        with self._one:
            self._check_open()
            yield

    def switch(self, cut: StageSet, keep_caches: bool) -> Switched:
        """Go on with other stages of the same model; returns when the old ones are closed. Call it in your `turn`.

        With `keep_caches` continuations go on where they are; without, those that have begun are finished on the old
        stages. EngineError if a stage does not open or caches do not move, RequestError if closed before.
        """
        began = perf_counter()
        old, new = self.lanes, Lanes(cut.stages, cut.threads, cut.devices)
        open_s = perf_counter() - began
        new.record(old.recorder)
        with self._state:
            self._new = new
        try:
            switched = Switched(open_s, self._change_over(new, cut, keep_caches))
            self.switches, self.last = self.switches + 1, switched
            return switched
        finally:
            with self._state:
                self._new, closed = None, self.closed
            (old if self.lanes is new else new).close()
            if closed and self.generator is None:
                self.lanes.close()

    def record(self, recorder: Recorder | None) -> None:
        """See `Pipeline.record`."""
        with self._state:
            for lanes in (self.lanes, self._new):
                if lanes is not None:
                    lanes.record(recorder)

    def close(self) -> None:
        """Fail what is unfinished, then end all threads. See `Pipeline.close`."""
        with self._state:
            self.closed = True
            switching = self._new is not None
        own_thread = self.is_own_thread()
        self.batches.close()
        if self.generator is not None:
            self.generator.close(wait=not own_thread)
        elif not switching:
            self.lanes.close()
        if not own_thread:
            self._one.acquire()  # a switch under way closes the lanes that are left
            self._one.release()

    def _change_over(self, new: Lanes, cut: StageSet, keep_caches: bool) -> float:
        """The pause in seconds. What fails leaves all on the old lanes."""
        changing = None
        try:
            self._check_open()
            self.batches.go_on(new, cut.stages).result()
            if self.generator is not None:
                changing = self.generator.go_on(new, generation_hops(cut), keep_caches)
                changing.result()
        except BaseException:
            # Generation may have changed over nevertheless, where this thread was interrupted.
            if changing is None or changing.cancel() or changing.exception() is not None:
                self.batches.go_on(self.lanes, self.cut.stages).result()
                raise
            self._serve_on(new, cut)
            raise
        self._serve_on(new, cut)
        return changing.result() if changing is not None else 0.0

    def _serve_on(self, lanes: Lanes, cut: StageSet) -> None:
        self.earlier_s += self.lanes.open_s - lanes.open_s
        self.lanes, self.cut = lanes, cut

    def _check_open(self) -> None:
        if self.closed:
            raise RequestError("the pipeline is closed")

    def is_own_thread(self) -> bool:
        """Whether the caller is a thread of stages or of generation, as a future's callback may be."""
        new = self._new
        return (
            self.lanes.is_worker()
            or (new is not None and new.is_worker())
            or (self.generator is not None and self.generator.is_driver())
        )


def generation_hops(cut: StageSet) -> tuple[Hop, ...]:
    """The way of a step of generation through the stages, to the logits."""
    return route([(stage.inputs, stage.outputs) for stage in cut.stages], CACHED_INPUTS, ["logits"])

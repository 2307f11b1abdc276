"""Generation's switch to other lanes between two steps, as a state machine that its driver asks at each turn.

    asked ──> draining ──> moving ──> done       steps run on the new lanes
                 │            └─────> failed     an engine raised: the caches are back, steps run on the old lanes
                 └──────────────────> dropped    its asker cancelled it, or the pipeline was closed (RequestError)

Draining with `keep_caches`: no step is issued, and the running ones are waited for; continuations notice only a pause.
Draining without: requests that have begun are finished, and those that come later, or still wait for a slot, are held.
To `replay` is to keep no caches but the continuations: the old lanes are lost, and each begins again with its tokens.
In the last three states steps are issued, nothing is held, and `pause_s` has the outcome for whoever asked.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import Literal

from stageline.models.errors import StagelineError
from stageline.runtime.engines import Engine, Value
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.stages.lanes import Lanes
from stageline.runtime.stages.route import Hop

State = Literal["asked", "draining", "moving", "done", "failed", "dropped"]


class Changeover:
    """A switch to `lanes` and the route `hops` through them. All but `pause_s` belongs to the driver's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        lanes: Lanes,
        hops: Sequence[Hop],
        keep_caches: bool,
        state: State = "asked",
        replay: bool = False,
    ) -> None:
        self.lanes, self.hops, self.keep_caches, self.state = lanes, tuple(hops), keep_caches or replay, state
        self.replay = replay
        self.held: list[Continuation] = []
        self.pause_s: Future[float] = Future()
        """Seconds from asking until steps run on the new lanes. It may be cancelled while draining."""
        self._scheduler = scheduler
        self._asked_at = perf_counter()

    @property
    def issues_steps(self) -> bool:
        """Whether steps may be issued, on the old lanes until it is done."""
        return not (self.keep_caches and self.state == "draining")

    def begin(self, before: "Changeover", has_begun: Callable[[Continuation], bool]) -> None:
        """Drain. The asker of `before` has given up if it is not finished; `has_begun`: whether its request has."""
        self.state = "draining"
        if before.state == "draining":
            before.state, self.held, before.held = "dropped", before.held, []
        if not self.keep_caches:
            later = [continuation for continuation in self._scheduler.waiting if not has_begun(continuation)]
            for continuation in later:
                self._scheduler.waiting.remove(continuation)
            self.held += later

    def admit(self, continuation: Continuation) -> None:
        """Queue a continuation that has come, or hold it."""
        if self.state == "draining" and not self.keep_caches:
            self.held.append(continuation)
        else:
            self._scheduler.add(continuation)

    def drained(self, in_flight: int) -> bool:
        """Whether `switch` is due, with `in_flight` steps running."""
        idle = not self._scheduler.running and not self._scheduler.waiting
        return self.state == "draining" and in_flight == 0 and (self.keep_caches or idle)

    def switch(self, old: Lanes, serve_on: Callable[[Lanes, tuple[Hop, ...]], None]) -> None:
        """Move the caches from the old lanes and call `serve_on`, once drained; nothing if the asker has cancelled."""
        if not self.pause_s.set_running_or_notify_cancel():
            self._finish("dropped")
            return
        self.state = "moving"
        try:
            if self.replay:
                self._scheduler.replay()
            elif self.keep_caches:
                move_caches(old, self.lanes)
            places, forget = self.lanes.places, self.replay or not self.keep_caches
            self._scheduler.switch(min(places, self._scheduler.slot_count), places, forget)
            serve_on(self.lanes, self.hops)
        except BaseException as error:
            self._finish("failed")
            self.pause_s.set_exception(error)
        else:
            self._finish("done")
            self.pause_s.set_result(perf_counter() - self._asked_at)

    def drop(self, error: StagelineError) -> None:
        """Give up with `error`, unless it is finished."""
        if self.state in ("asked", "draining"):
            self._finish("dropped")
            if self.pause_s.set_running_or_notify_cancel():
                self.pause_s.set_exception(error)

    def _finish(self, state: State) -> None:
        self.state = state
        held, self.held = self.held, []
        for continuation in held:
            if not continuation.ended:
                self._scheduler.add(continuation)


def move_caches(old: Lanes, new: Lanes) -> None:
    """Hand the caches of the old lanes' engines, on which no step is running, to those of the new ones.

    Raises what an engine raises; then the old engines have their caches back.
    """
    given = [old.ask(stage, _given) for stage in range(len(old))]
    try:
        caches = {name: cache for answer in given for name, cache in answer.result().items()}
        for taken in [new.ask(stage, partial(_take, caches)) for stage in range(len(new))]:
            taken.result()
    except BaseException:
        for stage, answer in enumerate(given):
            if answer.exception() is None:
                old.ask(stage, partial(_take, answer.result())).result()
        raise


def _given(engine: Engine) -> Mapping[str, Value]:
    return engine.give_caches()


def _take(caches: Mapping[str, Value], engine: Engine) -> None:
    engine.take_caches(caches)

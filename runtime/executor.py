"""The lanes that serve, with batches and generation on them, and their changeover to others while they do.

A changeover opens the new lanes beside the old ones, switches batches to them, switches generation between two steps,
and closes the old lanes when nothing is left on them. Until generation has switched everything can go back: a
changeover that fails leaves the old lanes serving. Changeovers are made one after the other, on their callers' threads.

    opening ──> batches switch ──> the last batch has left ──> generation switches ──> old lanes closed
       │                                                         │
       └── EngineError: new lanes closed                         └── error: batches switch back, new lanes closed
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Self

from stageline.models.errors import BundleError, RequestError, StageLostError
from stageline.runtime.batching.batches import Batches
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import CACHED_INPUTS, ROW_LENGTHS
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.cluster.addresses import is_remote
from stageline.runtime.devices import spread
from stageline.runtime.engines import CacheSize
from stageline.runtime.generation.draft_model import open_speculation
from stageline.runtime.generation.generator import Generator
from stageline.runtime.generation.step_times import StepTimes
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.options import OpenKeywords, PipelineOptions
from stageline.runtime.stages.lanes import Lanes
from stageline.runtime.stages.opening import Opener, StageSet, check_same_model
from stageline.runtime.stages.recorder import Recorder
from stageline.runtime.stages.recovery import Recovery
from stageline.runtime.stages.route import Hop, route

_STAYS = "stages in other processes or on other machines cannot be switched while they serve; open the pipeline again"


@dataclass(frozen=True)
class ChangeoverTimes:
    """How long a changeover took: `open_s` to open the new stages while the old ones served, and `pause_s` in which no
    step of generation was issued (requests that had not begun waited, where caches were not kept)."""

    open_s: float
    pause_s: float


class Executor:
    """The one owner of lanes, batches and generator until `close()`. `cut` is what the lanes were opened from."""

    def __init__(self, lanes: Lanes, cut: StageSet, batches: Batches, generator: Generator | None) -> None:
        self.lanes, self.cut, self.batches, self.generator = lanes, cut, batches, generator
        self.changeovers = 0
        self.last_changeover: ChangeoverTimes | None = None
        self.closed = False
        self.earlier_s = 0.0
        """Seconds that the pipeline was open before these lanes were."""
        self.recovery: Recovery | None = None
        """Opens stages again that are lost, if some are outside of this process."""
        self._one = threading.Lock()  # held by whoever switches
        self._state = threading.Lock()  # guards `closed` and `_new`
        self._new: Lanes | None = None  # beside the others, during a changeover

    @classmethod
    def open(
        cls,
        signature: Signature,
        cut: StageSet,
        options: PipelineOptions,
        text_model: TextModel | None = None,
        cache: CacheSize | None = None,
    ) -> Self:
        """Open all stages, each engine on its worker's thread; they generate if they are of a `text_model` with caches.

        EngineError if an engine does not open, BundleError if the stages do not compute the outputs of `signature`.
        What fails leaves no thread running.
        """
        names = [(stage.inputs, stage.outputs) for stage in cut.stages]
        route(names, [spec.name for spec in signature.graph_inputs], signature.check_outputs(None))
        lanes, generator = cut.open(), None
        try:
            batches = Batches(signature, cut.stages, lanes, options.queue, options.micro_batch)
            if text_model is not None and cache is not None:
                hops = generation_hops(cut)
                chunk = options.prefill_chunk or lanes.step_tokens
                times = StepTimes()
                drafts = open_speculation(options, cache, text_model, times, lanes.on_gpus)
                try:
                    own = options.queue, times, drafts, options.tpot_target
                    generator = Generator(lanes, hops, text_model, cache, chunk, *own)
                except BaseException:
                    if drafts is not None:
                        drafts.close()
                    raise
            executor = cls(lanes, cut, batches, generator)
            executor._recover_what_is_lost()
            return executor
        except BaseException:
            lanes.close()
            raise

    @property
    def opener(self) -> Opener:
        """What made the stages of the bundle. BundleError where there is none."""
        if self.cut.opener is None:
            raise BundleError("this pipeline was made of stages, not opened from a bundle; use Pipeline.open")
        return self.cut.opener

    def recut(
        self, stages: int | Sequence[int], threads: int | None = None, devices: Sequence[str] | None = None
    ) -> ChangeoverTimes:
        """See `Pipeline.recut`."""
        changes: OpenKeywords = {}
        if threads is not None:
            changes["threads"] = threads
        if devices is not None:
            spread(devices, stages if isinstance(stages, int) else len(stages))  # RequestError
            changes["devices"] = devices
            if any(map(is_remote, devices)):
                raise RequestError(_STAYS)
        with self._turn():
            opener = replace(self.opener, options=replace(self.opener.options, **changes))
            with opener.recut(stages) as cut:
                return self._switch(cut, keep_caches=True)

    def swap_weights(self, bundle: Bundle) -> ChangeoverTimes:
        """See `Pipeline.swap_weights`."""
        check_same_model(self.opener.bundle, bundle)
        with self._turn(), replace(self.opener, bundle=bundle).recut(self.cut.layers) as cut:
            return self._switch(cut, keep_caches=False)

    def reopen(self) -> ChangeoverTimes:
        """Open all stages again, one of which is lost, and begin again on them with what was under way.

        StagelineError if that cannot be; RequestError if it never will.
        """
        with self._one:
            self.check_open()
            with self.opener.again().recut(self.cut.layers) as cut:
                return self._switch(cut, keep_caches=True, replay=True)

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
        if self.recovery is not None:
            self.recovery.stop()
        own_thread = self.is_own_thread()
        self.batches.close()
        if self.generator is None:
            self._close_lanes()
        else:
            self.generator.close().add_done_callback(lambda _: self._close_lanes())
        if not own_thread:
            if self.generator is not None:
                self.generator.join()
            if self.recovery is not None:
                self.recovery.join()
            with self._one:  # a running changeover closes the lanes that it leaves
                pass

    @property
    def broken(self) -> str | None:
        """See `Pipeline.broken`."""
        lanes, reason = self.lanes, self.generator.broken if self.generator is not None else None
        if not lanes.alive and lanes is self.lanes:  # else they were closed by a changeover
            reason = reason or "the worker of a stage has ended by a bug"
        reason = reason or (lanes.lost if self.recovery is None else self.recovery.failed)
        return None if self.closed else reason

    def check_open(self) -> None:
        """RequestError once closed."""
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

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for running changeovers; nobody else switches in this context. RequestError where that cannot be."""
        if self.is_own_thread():
            raise RequestError(
                "stages cannot be switched by a callback on one of the pipeline's threads: it would wait for itself; "
                "use another thread"
            )
        if self.cut.outside:
            raise RequestError(_STAYS)
        with self._one:
            self.check_open()
            yield

    def _recover_what_is_lost(self) -> None:
        if not self.cut.outside:
            return
        self.batches.waits_for_lost = True
        if self.generator is not None:
            self.generator.waits_for_lost = True
        self.recovery = Recovery(lambda: self.lanes.lost, self.reopen, self._give_up)

    def _give_up(self, error: StageLostError) -> None:
        self.batches.give_up(error)
        if self.generator is not None:
            self.generator.give_up(error)

    def _switch(self, cut: StageSet, keep_caches: bool, replay: bool = False) -> ChangeoverTimes:
        """Switch to other stages of the same model; returns when the old ones are closed. Call it in your `_turn`.

        With `keep_caches` continuations keep their places; without, those that have begun are finished on the old
        stages. `replay`: the old ones are lost, and continuations are computed again. EngineError if a stage does not
        open or caches do not move, RequestError if closed before.
        """
        began = perf_counter()
        old, new = self.lanes, cut.open()
        open_s = perf_counter() - began
        new.record(old.recorder)
        with self._state:
            self._new = new
        try:
            times = ChangeoverTimes(open_s, self._switch_work(new, cut, keep_caches, replay))
            self.changeovers, self.last_changeover = self.changeovers + 1, times
            return times
        finally:
            with self._state:
                self._new = None
            (old if self.lanes is new else new).close()

    def _switch_work(self, new: Lanes, cut: StageSet, keep_caches: bool, replay: bool) -> float:
        """The pause in seconds. What fails leaves all work on the old lanes."""
        pause_s = None
        try:
            self.check_open()
            self.batches.switch(new, cut.stages).result()
            if self.generator is not None:
                pause_s = self.generator.switch(new, generation_hops(cut), keep_caches, replay)
                pause_s.result()
        except BaseException:
            # Generation may have switched nevertheless, where this thread was interrupted.
            if pause_s is None or pause_s.cancel() or pause_s.exception() is not None:
                self.batches.switch(self.lanes, self.cut.stages).result()
                raise
            self._serve_on(new, cut)
            raise
        self._serve_on(new, cut)
        return pause_s.result() if pause_s is not None else 0.0

    def _serve_on(self, lanes: Lanes, cut: StageSet) -> None:
        self.earlier_s += self.lanes.open_s - lanes.open_s
        self.lanes, self.cut = lanes, cut

    def _close_lanes(self) -> None:
        """Close all lanes, once no step of generation runs on them. A changeover may close its own a second time."""
        with self._state:
            lanes = [self.lanes] if self._new is None else [self.lanes, self._new]
        for one in lanes:
            one.close()


def generation_hops(cut: StageSet) -> tuple[Hop, ...]:
    """The route of a step of generation through the stages, to the logits."""
    return route([(stage.inputs, stage.outputs) for stage in cut.stages], (*CACHED_INPUTS, ROW_LENGTHS), ["logits"])

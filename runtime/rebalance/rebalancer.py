"""The thread that watches a pipeline's stages and advises another cut, or switches to it."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import engine_on
from stageline.runtime.executor import Executor
from stageline.runtime.rebalance.costs import UseSeconds, use_seconds, work_seconds
from stageline.runtime.rebalance.policy import Advice, Observation, Policy, PolicySettings
from stageline.runtime.stages.lanes import StageStats

Mode = Literal["advise", "auto"]
log = logging.getLogger("stageline.rebalance")


@dataclass(frozen=True)
class RebalanceStats:
    """`advice` is the latest that still holds: not yet taken, and for the current cut."""

    mode: Mode
    advice: Advice | None


class Rebalancer:
    """Watches the stages of `executor`, which it borrows, until it is stopped; with "auto" it recuts them."""

    def __init__(self, executor: Executor, mode: Mode, settings: PolicySettings | None = None) -> None:
        self._executor, self._mode = executor, mode
        self._past = executor.generator.capacity // 4 if executor.generator else 0
        """Tokens that a decode step is taken to find in the caches."""
        self._settings = settings or PolicySettings()
        self._policy = Policy(self._settings)
        self._advice: Advice | None = None
        self._costs: tuple[Bundle, int, UseSeconds] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rebalance", daemon=True)
        self._thread.start()

    def stats(self) -> RebalanceStats:
        """A snapshot."""
        advice = self._advice
        holds = advice is not None and advice.now == self._executor.cut.layers
        return RebalanceStats(self._mode, advice if holds else None)

    def stop(self) -> None:
        """Begin no other changeover."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread; a running changeover ends first."""
        self._thread.join()

    def _watch(self) -> None:
        lanes, before = self._executor.lanes, self._executor.lanes.stats(1.0)
        while not self._stop.wait(self._settings.window_s):
            try:
                if self._executor.lanes is not lanes:  # switched since, by us or by hand
                    self._policy.switched(monotonic())
                    lanes = self._executor.lanes
                else:
                    self._observe(before, lanes.stats(1.0))
                before = lanes.stats(1.0)
            except Exception:
                log.exception("rebalancing met a bug; this window does not count")

    def _observe(self, before: Sequence[StageStats], after: Sequence[StageStats]) -> None:
        cut = self._executor.cut
        if cut.bundle is None or len(cut.layers) != len(after) or not after[0].runs - before[0].runs:
            return
        amounts = {kind: amount.since(before[0].amounts[kind]) for kind, amount in after[0].amounts.items()}
        expected = work_seconds(self._use_seconds(cut.bundle, after), amounts, self._past)
        window = Observation(
            cut.layers,
            tuple(now.busy_s - then.busy_s for then, now in zip(before, after, strict=True)),
            tuple(now.runs - then.runs for then, now in zip(before, after, strict=True)),
            expected.use_s,
            expected.later_stage_s,
        )
        advice = self._policy.observe(monotonic(), window)
        if advice is None:
            if window.excess <= self._settings.margin:
                self._advice = None
            return
        if self._advice is None or self._advice.layers != advice.layers:
            log.info("%s", advice)
        self._advice = advice
        if self._mode == "auto":
            self._recut(advice)

    def _recut(self, advice: Advice) -> None:
        if self._stop.is_set():
            return
        try:
            times = self._executor.recut(advice.layers)
        except StagelineError as error:
            if not self._stop.is_set():
                log.warning("the stages stay as they are: %s", error)
            self._policy.switched(monotonic())
            return
        layers = ",".join(map(str, advice.layers))
        log.info("now layers %s: opened in %.2f s, a pause of %.0f ms", layers, times.open_s, times.pause_s * 1e3)

    def _use_seconds(self, bundle: Bundle, stages: Sequence[StageStats]) -> UseSeconds:
        threads = len(stages[0].cores)
        if self._costs is None or self._costs[:2] != (bundle, threads):
            on_cpu = all(stage.device == "cpu" for stage in stages)
            options = self._executor.opener.options
            engine = engine_on(options.engine, stages[0].device)
            self._costs = bundle, threads, use_seconds(bundle, threads, on_cpu, options.quantise, engine)
        return self._costs[2]

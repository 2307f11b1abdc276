"""Samples queue, utilisation, memory and power twice a second while a contender is driven."""

import threading
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Self

from stageline.runtime.bench.client import Client
from stageline.runtime.bench.contenders import Contender
from stageline.runtime.bench.energy import Meters, host_memory_bytes
from stageline.runtime.bench.figures import StageUse
from stageline.runtime.bench.records import Series
from stageline.runtime.stages.lanes import StageStats

PERIOD_S = 0.5
_MAX_SAMPLES = 2000  # per measurement; more are thinned evenly


class Monitor:
    """Samples while it is entered; then has `figures` and `use` of that time. `samples` count from `began_at`."""

    def __init__(self, contender: Contender, client: Client, meters: Meters, began_at: float) -> None:
        self._contender, self._client, self._meters = contender, client, meters
        self._began_at = began_at
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="monitor", daemon=True)
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.figures: dict[str, float] = {}
        self.use: StageUse | None = None

    def __enter__(self) -> Self:
        self._stages = self._stats()
        self._energy_j = self._meters.energy_j()
        self._entered_at = perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        seconds = perf_counter() - self._entered_at
        if self._stages:
            self.use = StageUse.between(self._stages, self._stats())
        if self._meters.measures_energy:
            self.figures["energy_j"] = self._meters.energy_j() - self._energy_j
            self.figures["power_w"] = self.figures["energy_j"] / seconds
        for name, pick in (("host_memory_bytes", max), ("device_memory_bytes", max), ("queue_depth", _mean)):
            values = [sample[name] for _, sample in self.samples if name in sample]
            if values:
                self.figures[name] = pick(values)

    def _stats(self) -> tuple[StageStats, ...]:
        return () if self._contender.pipeline is None else self._contender.pipeline.stats().stages

    def _sample(self) -> None:
        before, answered, energy_j = perf_counter(), self._client.answered, self._energy_j
        stages = self._stages
        while True:
            over = self._stop.wait(PERIOD_S)
            now = perf_counter()
            if over and self.samples:
                return
            sample = {"host_memory_bytes": float(host_memory_bytes())}
            sample["requests_per_s"] = (self._client.answered - answered) / (now - before)
            answered = self._client.answered
            if self._meters.measures_energy:
                sample["power_w"] = (self._meters.energy_j() - energy_j) / (now - before)
                energy_j += sample["power_w"] * (now - before)
            if self._meters.has_gpu:
                sample["device_memory_bytes"] = float(self._meters.device_memory_bytes())
            if self._contender.pipeline is not None:
                stats = self._contender.pipeline.stats()
                waiting = stats.queued if stats.generation is None else stats.generation.waiting
                sample["queue_depth"] = float(waiting)
                use = StageUse.between(stages, stats.stages)
                for number, busy_s in enumerate(use.busy_s):
                    sample[f"utilisation_{number}"] = busy_s / (now - before)
                stages = stats.stages
            before = now
            self.samples.append((now - self._began_at, sample))
            if over:
                return


def series(samples: Sequence[tuple[float, dict[str, float]]]) -> Series:
    """The samples of all repeats as columns, thinned if there are many."""
    step = -(-len(samples) // _MAX_SAMPLES) or 1
    kept = samples[::step]
    names = [name for name in (kept[0][1] if kept else {}) if all(name in sample for _, sample in kept)]
    return Series(tuple(at for at, _ in kept), {name: tuple(sample[name] for _, sample in kept) for name in names})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""Timing the layers of a bundle's stages on this machine: each stage on its own device, one after the other."""

import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import Array, Device, on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, pin
from stageline.runtime.engines import StageFile, default_device
from stageline.runtime.engines.base import CacheSize, WeightDtype
from stageline.runtime.layers.engines import Run, TimedEngine, check_timed, open_timed
from stageline.runtime.layers.profile import Layer, LayerProfile, StageGraph, StageTimes, StepTimes
from stageline.runtime.planning.random_inputs import random_inputs
from stageline.runtime.workload import Shape

_WARM_UP, _RUNS = 3, 20
_ROWS, _TOKENS, _PAST = 8, 128, 256  # at most, of what is timed


def default_shapes(manifest: Manifest) -> list[Shape]:
    """A micro-batch of texts; for a model with caches, a prompt, and a step of one token for several rows."""
    limit = manifest.max_positions or 2 * _PAST
    if not manifest.cached:
        return [Shape(_ROWS, min(limit, _TOKENS))]
    return [Shape(1, min(limit, _TOKENS), picks=1), Shape(_ROWS, 1, min(limit - 1, _PAST), 1)]


def time_layers(
    bundle: Bundle,
    engine: str = "onnxruntime",
    threads: int | None = None,
    quantise: WeightDtype | None = None,
    progress: Callable[[float, str], None] = lambda share, step: None,
) -> LayerProfile:
    """Run the bundle's stages on random inputs, each on what the one before gave, and time their layers.

    The stages share `threads` cores (None: all that this process may use), as in a pipeline, but run one at a time.
    `progress` gets the share that is done, 0 to 1, and what is next. EngineError if the engine's layers cannot be
    timed, or it does not open.
    """
    check_timed(engine)
    manifest = bundle.manifest
    shapes = default_shapes(manifest)
    cache = None
    if manifest.cached:
        cache = CacheSize(max(one.batch for one in shapes), max(one.past + one.length for one in shapes))
    steps = len(manifest.stages) * (1 + len(shapes))
    done = 0

    def at(step: str) -> None:
        nonlocal done
        progress(done / steps, step)
        done += 1

    with tempfile.TemporaryDirectory(prefix="stageline-") as scratch:
        stages: list[_Stage] = []
        try:
            for number, device in enumerate(open_devices([default_device(engine)] * len(manifest.stages), threads)):
                at(f"opening stage {number}")
                stages.append(_Stage.open(bundle, number, device, engine, cache, quantise, Path(scratch)))
            for shape in shapes:
                values = random_inputs(manifest, shape)
                for number, stage in enumerate(stages):
                    at(f"stage {number}, {shape.batch} x {shape.length} tokens")
                    values |= stage.time(values, cache is not None)
        finally:
            closed = [stage.close() for stage in stages]
    return LayerProfile(
        machine=stages[0].timed.machine,
        threads=len(allowed_cores()[:threads]),
        stages=tuple(graph for graph, _ in closed),
        steps=tuple(
            StepTimes(
                batch=shape.batch,
                length=shape.length,
                past=shape.past,
                runs=_RUNS,
                stages=tuple(times[number] for _, times in closed),
            )
            for number, shape in enumerate(shapes)
        ),
    )


@dataclass(frozen=True)
class _Stage:
    """An open stage, the thread that it belongs to, and the mean time of its runs for each shape so far."""

    first: int
    end: int
    timed: TimedEngine
    device: Device
    worker: ThreadPoolExecutor
    seconds: list[float]

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        number: int,
        device: Device,
        engine: str,
        cache: CacheSize | None,
        quantise: WeightDtype | None,
        scratch: Path,
    ) -> "_Stage":
        stage = bundle.manifest.stages[number]
        file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
        worker = ThreadPoolExecutor(1, "layers", partial(pin, device.cores) if isinstance(device, CpuDevice) else None)
        try:
            opened = worker.submit(open_timed, engine, file, device, cache, quantise, scratch).result()
        except BaseException:
            worker.shutdown()
            raise
        return cls(stage.first_block, stage.last_block + 1, opened, device, worker, [])

    def time(self, values: dict[str, Array], steps: bool) -> dict[str, Array]:
        """Run the stage several times on these inputs, and return what it gives."""
        return self.worker.submit(self._time, values, steps).result()

    def _time(self, values: dict[str, Array], steps: bool) -> dict[str, Array]:
        engine, taken = self.timed.engine, []
        for _ in range(_WARM_UP + _RUNS):
            began = perf_counter()
            names = engine.output_names
            given = engine.step(values, names, 0) if steps else engine.run(values, names)
            taken.append(perf_counter() - began)
            self.timed.ran()
        self.seconds.append(sum(taken[_WARM_UP:]) / _RUNS)
        return on_host(given, engine.output_names)

    def close(self) -> tuple[StageGraph, list[StageTimes]]:
        """Free the stage: what it held, and its times for each shape."""
        try:
            return self.worker.submit(self._close).result()
        finally:
            self.worker.shutdown()

    def _close(self) -> tuple[StageGraph, list[StageTimes]]:
        caches = self.timed.engine.give_caches().values()
        cache_bytes = sum(math.prod(one.shape) * one.dtype.itemsize for one in caches)
        runs, weights = self.timed.close()
        self.device.close()
        graph = StageGraph(
            first=self.first,
            end=self.end,
            weights=dict(weights),
            cache_bytes=cache_bytes,
        )
        each = _WARM_UP + _RUNS
        times = [
            StageTimes(seconds=seconds, layers=_means(runs[number * each + _WARM_UP : (number + 1) * each]))
            for number, seconds in enumerate(self.seconds)
        ]
        return graph, times


def _means(runs: Sequence[Run]) -> tuple[Layer, ...]:
    """The mean of each layer over runs of the same graph."""
    total: Run = {}
    for run in runs:
        for name, seconds in run.items():
            total[name] = total.get(name, 0.0) + seconds
    return tuple(
        Layer(name=name.name, kind=name.kind, precision=name.precision, seconds=max(0.0, seconds / len(runs)))
        for name, seconds in total.items()
    )

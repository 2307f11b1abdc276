"""Measuring a bundle's parts on this machine: small stages in the engine, timed alone and beside each other.

Ranges of blocks are stitched as stages (each kind of block alone, quarters, halves, the whole) and timed for
micro-batches of several shapes, pinned to one core per thread. The result is the median over the runs and over up to
three passes, so that a disturbance of a few seconds does not count. The blocks before a range compute its inputs.
Between runs as many bytes are read as the rest of the model has weights: in a pipeline those, too, evict a stage's
weights from the CPU's caches. Then stages of equal length, each on its own cores, are timed one at a time and all at
once. The slowdown, the median of all passes, is their contention for what cores share (memory bandwidth).
"""

import itertools
import math
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from stageline.models.errors import StagelineError
from stageline.models.tensors import PackedEntry
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Manifest, uses_of
from stageline.runtime.bundle.stitch import stitch
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, others_cpu_s, pin, share_cores, start_worker
from stageline.runtime.engines import Array, Engine, StageFile, engine_factory
from stageline.runtime.engines.base import CacheSize, WeightDtype
from stageline.runtime.engines.lowering.nbits import bytes_per_weight, packed_bytes
from stageline.runtime.planning.cost import use_costs
from stageline.runtime.planning.host import driver_times_s
from stageline.runtime.planning.profile import Contention, Grid, Machine, MachineProfile, Point
from stageline.runtime.planning.random_inputs import random_inputs
from stageline.runtime.words import counted
from stageline.runtime.workload import Shape

_MIN_RUNS, _MAX_RUNS, _POINT_S, _POINT_WALL_S = 2, 40, 0.1, 0.25  # the last with what happens between runs
_BESIDE_ROUNDS, _MAX_BESIDE = 3, 4
_WHOLE_LIMIT_BYTES = 8e9  # of weights: beyond it no range longer than a quarter is opened
_FEW_BLOCKS = 12
_MAX_CACHE_BYTES = 128_000_000
_HANDOVERS = 400
_TRIES, CALM = 3, 0.1  # runs are calm if other processes took less than this share of a core
T = TypeVar("T")


def default_grids(manifest: Manifest) -> list[Grid]:
    """Whole rows and, for a model with caches, steps of one token."""
    longest = manifest.max_positions or 512

    def up_to_longest(*lengths: int) -> tuple[int, ...]:
        return tuple(sorted({min(length, longest) for length in lengths}))

    if not manifest.cached:
        return [Grid((1, 8), up_to_longest(16, 32, 64, 128))]
    pasts = tuple(sorted({min(past, longest - 1) for past in (32, 256)}))
    return [Grid((1, 4), up_to_longest(16, 64)), Grid((1, 4, 16), (1,), pasts)]


def measure(
    bundle: Bundle,
    threads: Sequence[int] = (1, 2),
    grids: Sequence[Grid] | None = None,
    progress: Callable[[float, str], None] = lambda share, step: None,
    passes: int = 3,
    quantise: WeightDtype | None = None,
    budget_s: float = math.inf,
    engine: str = "onnxruntime",
) -> MachineProfile:
    """Time the bundle's parts for each number of threads that this machine has cores for, `passes` times, in engines
    of this name opened with `quantise`. StagelineError if it has too few cores for all of them, EngineError if the
    engine is not there.

    After the first pass others are made only if they are likely to end within `budget_s` seconds, and what is disturbed
    is repeated only in the first half of them. `progress` gets the share that is done, 0 to 1, and what is next.
    """
    cores = allowed_cores()
    grids = default_grids(bundle.manifest) if grids is None else grids
    able = [count for count in threads if count <= len(cores)]
    if not able:
        raise StagelineError(f"this machine has {len(cores)} cores, too few for {', '.join(map(str, threads))} threads")
    engine_factory(engine)  # EngineError, before all else
    model = _Model.of(bundle, quantise, engine)
    found: dict[tuple[int, ...], list[Point]] = {}
    beside: dict[tuple[int, ...], list[Contention]] = {}
    began = perf_counter()
    retry_until = began + budget_s / 2
    measured = ranges(bundle, quantise)
    steps = len(able) * (len(measured) + 1)  # of a pass
    done = 0

    def fitting() -> int:
        return _fitting(passes, budget_s, perf_counter() - began, done / steps)

    def at(step: str) -> None:
        number = done // steps + 1
        progress(done / steps / max(number, fitting()), f"pass {number}: {step}")

    while done < steps * fitting():
        for count in able:
            for first, end in measured:
                at(f"{counted(count, 'core')}, blocks {first} to {end - 1}")
                with _worker(cores[:count]) as worker:
                    submit = partial(worker.submit, _range_points, model, first, end, cores[:count], grids)
                    points, _ = undisturbed(lambda submit=submit: submit().result(), retry_until)  # type: ignore[misc]
                for point in points:
                    found.setdefault((count, point.batch, point.length, point.past, first, end), []).append(point)
                done += 1
            at(f"stages on {counted(count, 'core')} each, side by side")
            for one in _contention(model, count, cores, grids, retry_until):
                beside.setdefault((count, one.batch, one.length, one.past), []).append(one)
            done += 1
    step_s, row_s = driver_times_s(bundle) if bundle.manifest.cached else (0.0, 0.0)
    return MachineProfile(
        machine=Machine.here(quantise, engine),
        handover_s=_handover_s(cores),
        host_step_s=step_s,
        host_row_s=row_s,
        points=tuple(_middle(points, lambda point: point.seconds) for points in found.values()),
        contention=tuple(_middle(ones, lambda one: one.share) for ones in beside.values()),
    )


def _fitting(passes: int, budget_s: float, passed_s: float, done: float) -> int:
    """How many of `passes` fit into the budget if all take as long as the `done` ones (a fraction at first)."""
    return max(1, int(min(passes, budget_s * done / passed_s))) if done else passes


def _middle(found: Sequence[T], of: Callable[[T], float]) -> T:
    return sorted(found, key=of)[len(found) // 2]


def undisturbed(work: Callable[[], T], retry_until: float = math.inf) -> tuple[T, float]:
    """The result of `work`, and the share of a core that other processes took at the same time.

    Out of up to three tries, none of which begins again after `retry_until` (perf_counter): the first that is hardly
    disturbed, or else the least disturbed one.
    """
    best: tuple[T, float] | None = None
    for _ in range(_TRIES):
        began, others_s = perf_counter(), others_cpu_s()
        found = work()
        share = (others_cpu_s() - others_s) / (perf_counter() - began)
        if best is None or share < best[1]:
            best = found, share
        if share < CALM or perf_counter() > retry_until:
            break
    assert best is not None
    return best


def ranges(bundle: Bundle, quantise: WeightDtype | None = None) -> list[tuple[int, int]]:
    """The ranges of blocks to measure: parts of the model from both ends and its middle, and each kind of block alone
    if there are several, or few blocks.

    A block alone stays in the CPU's caches from run to run; in a long stage it does not. A long model has long stages,
    so it is measured in long ranges.
    """
    n, uses = bundle.manifest.blocks, bundle.manifest.uses
    quarter, half = max(1, n // 4), max(1, n // 2)
    middle = range(1, n - 1) if n > 2 else range(n)
    kinds = {uses[block + 1].part: (block, block + 1) for block in reversed(middle)}
    found = list(kinds.values()) if len(kinds) > 1 or n < _FEW_BLOCKS else []
    found += [(0, quarter), (n - quarter, n)]
    if _opens_whole(bundle, quantise):
        found += [(0, n), (0, half), (n - half, n)]
        found += [(quarter, n - quarter)] if n >= _FEW_BLOCKS else []
    return [(first, end) for first, end in dict.fromkeys(found) if end <= n]


def _opens_whole(bundle: Bundle, quantise: WeightDtype | None) -> bool:
    """Whether ranges longer than a quarter are measured: the weights of all blocks are not too many for that."""
    entries = bundle.weights.values()
    if quantise is not None:
        size = sum(math.prod(entry.shape) for entry in entries) * bytes_per_weight(quantise)
    else:
        size = sum(packed_bytes(e)[0] if isinstance(e, PackedEntry) else e.size_bytes for e in entries)
    return size <= _WHOLE_LIMIT_BYTES


@dataclass(frozen=True)
class _Model:
    """What is measured. `reads`: the bytes of weights that each use reads; `quantise`: as engines quantise weights."""

    bundle: Bundle
    parts: Sequence[ir.Model]
    reads: tuple[int, ...]
    quantise: WeightDtype | None
    engine: str

    @classmethod
    def of(cls, bundle: Bundle, quantise: WeightDtype | None, engine: str) -> "_Model":
        parts = bundle.parts()
        costs = use_costs(bundle.manifest, bundle.tensors, parts, Shape(1, 1), quantise=quantise)
        return cls(bundle, parts, tuple(cost.weight_read_bytes for cost in costs), quantise, engine)

    def open(self, first: int, end: int, cores: tuple[int, ...], cache: CacheSize | None, scratch: Path) -> Engine:
        """The engine of a stage of blocks `first` to `end` - 1, on the thread that runs it."""
        manifest = self.bundle.manifest
        counts = [count for count in (first, end - first, manifest.blocks - end) if count]
        number = 1 if first else 0
        model, stage = stitch(Crossing.of(manifest, self.parts, counts), number, self.bundle.tensors, self.bundle.path)
        file = scratch / f"{first}-{end}.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        opening = StageFile(number, file, self.bundle.path, stage.caches)
        return engine_factory(self.engine)(opening, CpuDevice(cores), cache, self.quantise)


def _worker(cores: tuple[int, ...]) -> ThreadPoolExecutor:
    """One thread, pinned to `cores`: engines belong to the thread that opens them."""
    return ThreadPoolExecutor(1, "profile", partial(pin, cores))


def _range_points(
    model: _Model,
    first: int,
    end: int,
    cores: tuple[int, ...],
    grids: Sequence[Grid],
) -> list[Point]:
    """The times of one range for all shapes; called on the thread that runs the engines."""
    shapes = [shape for grid in grids for shape in grid.shapes()]
    manifest = model.bundle.manifest
    cache = _cache_size(manifest, shapes)
    rest = _rest_of_model(model.reads, first, end)
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        # The blocks before the range are not timed, and open faster without quantisation.
        feeder = replace(model, quantise=None)
        before = feeder.open(0, first, cores, cache, Path(scratch)) if first else None
        engine = model.open(first, end, cores, cache, Path(scratch))
        for shape in shapes:
            values = random_inputs(manifest, shape)
            if before is not None:
                values.update(_run(before, values, before.output_names, cache))
            seconds, runs = _median_s(partial(_run, engine, values, engine.output_names, cache), rest)
            points.append(
                Point(
                    threads=len(cores), batch=shape.batch, length=shape.length, past=shape.past,
                    first=first, end=end, seconds=seconds, runs=runs,
                )
            )  # fmt: skip
        for opened in (engine, before):
            if opened is not None:
                opened.close()
    return points


def _contention(
    model: _Model, threads: int, cores: Sequence[int], grids: Sequence[Grid], retry_until: float
) -> list[Contention]:
    """How much longer equal stages on `threads` cores each take when all of them run than when one does."""
    manifest = model.bundle.manifest
    count = min(len(cores) // threads, _MAX_BESIDE, manifest.blocks)
    if count < 2:
        return []
    bounds = [manifest.blocks * number // count for number in range(count + 1)]
    shares = share_cores(count, cores[: count * threads])
    shapes = [shape for grid in grids for shape in grid.corners()]
    cache = _cache_size(manifest, shapes)
    workers = [_worker(share) for share in shares]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        engines = [
            worker.submit(model.open, first, end, share, cache, Path(scratch)).result()
            for worker, (first, end), share in zip(workers, itertools.pairwise(bounds), shares, strict=True)
        ]
        rests = [_rest_of_model(model.reads, first, end) for first, end in itertools.pairwise(bounds)]
        for shape in shapes:
            values = random_inputs(manifest, shape)
            runs: list[Callable[[], object]] = []
            for worker, engine in zip(workers, engines, strict=True):
                run = partial(_run, engine, dict(values), engine.output_names, cache)
                values.update(worker.submit(run).result())
                runs.append(run)
            for _ in range(_BESIDE_ROUNDS):
                longer, _ = undisturbed(partial(_longer, workers, runs, rests), retry_until)
                share = max(0.0, longer) / (count - 1)
                found.append(
                    Contention(threads=threads, batch=shape.batch, length=shape.length, past=shape.past, share=share)
                )
        for worker, engine in zip(workers, engines, strict=True):
            worker.submit(engine.close).result()
            worker.shutdown()
    return found


def _longer(
    workers: Sequence[ThreadPoolExecutor],
    runs: Sequence[Callable[[], object]],
    rests: Sequence[Callable[[], object]],
) -> float:
    """By what share these take longer all at once than one at a time, each on its own worker."""
    alone_s = [
        worker.submit(_median_until, run, rest, perf_counter() + _POINT_S).result()
        for worker, run, rest in zip(workers, runs, rests, strict=True)
    ]
    stop_s = perf_counter() + max(_POINT_S, 3 * max(alone_s))
    beside = [worker.submit(_median_until, run, _nothing, stop_s) for worker, run in zip(workers, runs, strict=True)]
    return sum(one.result() for one in beside) / sum(alone_s) - 1


def _nothing() -> None:
    """Between concurrent runs: the other stages read memory."""


def _cache_size(manifest: Manifest, shapes: Sequence[Shape]) -> CacheSize | None:
    if not manifest.cached:
        return None
    return CacheSize(max(s.batch for s in shapes), max(s.past + s.length for s in shapes), "float32")


def _run(
    engine: Engine, values: Mapping[str, Array], outputs: Sequence[str], cache: CacheSize | None
) -> dict[str, Array]:
    given = engine.run(values, outputs) if cache is None else engine.step(values, outputs, 0)
    return on_host(given, outputs)


def _rest_of_model(reads: Sequence[int], first: int, end: int) -> Callable[[], object]:
    """Reads as many bytes as the uses outside this stage read of weights, up to more than any cache holds."""
    count_bytes = sum(reads) - sum(uses_of(reads, first, end))
    values = np.ones(min(count_bytes, _MAX_CACHE_BYTES) // 4 + 1, np.float32)
    return values.max


def _median_s(run: Callable[[], object], between: Callable[[], object]) -> tuple[float, int]:
    run()
    taken: list[float] = []
    stop_s = perf_counter() + _POINT_WALL_S
    while len(taken) < _MIN_RUNS or (sum(taken) < _POINT_S and len(taken) < _MAX_RUNS and perf_counter() < stop_s):
        between()
        began = perf_counter()
        run()
        taken.append(perf_counter() - began)
    return statistics.median(taken), len(taken)


def _median_until(run: Callable[[], object], between: Callable[[], object], stop_s: float) -> float:
    """The median of the runs that end by then, at least one."""
    taken: list[float] = []
    while True:
        between()
        began = perf_counter()
        run()
        ended = perf_counter()
        if taken and ended > stop_s:
            return statistics.median(taken)
        taken.append(ended - began)


def _handover_s(cores: Sequence[int]) -> float:
    """Half of the median time of a message to another pinned thread and back."""
    there: SimpleQueue[object] = SimpleQueue()
    back: SimpleQueue[object] = SimpleQueue()

    def echo() -> None:
        for message in iter(there.get, None):
            back.put(message)

    taken: list[float] = []

    def send() -> None:
        for _ in range(_HANDOVERS):
            began = perf_counter()
            there.put(taken)
            back.get()
            taken.append((perf_counter() - began) / 2)
        there.put(None)

    workers: list[threading.Thread] = [start_worker("echo", cores[-1:], echo), start_worker("send", cores[:1], send)]  # type: ignore[arg-type]
    for worker in workers:
        worker.join()
    return statistics.median(taken)

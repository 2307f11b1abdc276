"""How fast this machine's cores are, measured in about a second: what plans of bundles without a profile compute with.

Workers side by side, each on its own cores, run two graphs in the engine: the feed-forward parts of Transformer blocks
on many rows, which compute, and a chain of large matrices on one row, which reads weights. What they reach is kept in
the user's cache, by machine, engine and quantisation.
"""

import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
import pydantic
from stageline.models.user_cache import user_cache
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, pin, share_cores
from stageline.runtime.engines import Array, StageFile, engine_factory
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.engines.lowering.nbits import bytes_per_weight
from stageline.runtime.planning.device_kinds import Positive
from stageline.runtime.planning.measure import CALM, undisturbed
from stageline.runtime.planning.profile import Machine
from stageline.runtime.validation import Data

_ROWS, _WIDTH, _LAYERS = 64, 512, 2
_SIDE, _MATRICES = 2048, 4  # 67 MB in float32, for all workers together at least
_POINT_S, _MIN_RUNS, _RETRY_S = 0.4, 3, 2.0
Count = Annotated[int, pydantic.Field(ge=1)]


class Speed(Data):
    """What each of `count` workers reaches, on `threads` cores each, while all work: operations of matrix products and
    bytes of weights per second. `disturbed`: other processes took more than a tenth of a core meanwhile."""

    count: Count
    threads: Count
    flops_per_s: Positive
    bytes_per_s: Positive
    disturbed: bool = False


class _Speeds(Data):
    format: Literal["stageline-speeds"] = "stageline-speeds"
    version: Literal[1] = 1
    machine: Machine
    speeds: tuple[Speed, ...] = ()


def known_speed(count: int, threads: int, quantise: WeightDtype | None = None) -> Speed | None:
    """The speed that `speed` measured before on this machine; None if it has not, or its file cannot be read."""
    return next((one for one in _read(quantise) if (one.count, one.threads) == (count, threads)), None)


def speed(count: int, threads: int, quantise: WeightDtype | None = None) -> Speed:
    """The speed of `count` workers of `threads` cores on this machine, with weights of matrices quantised if asked to.

    Measured the first time, and kept if other processes left the cores alone meanwhile.
    """
    known = known_speed(count, threads, quantise)
    if known is not None:
        return known
    found, others = undisturbed(partial(measured_speed, count, threads, quantise), perf_counter() + _RETRY_S)
    if others >= CALM:
        return found.model_copy(update={"disturbed": True})
    _write(quantise, [*_read(quantise), found])
    return found


def measured_speed(count: int, threads: int, quantise: WeightDtype | None = None) -> Speed:
    """Measure it now, in about a second."""
    shares = share_cores(count, allowed_cores()[: count * threads])
    flops = 2 * 2 * _ROWS * _WIDTH * 4 * _WIDTH * _LAYERS
    matrices = max(1, _MATRICES // count)
    read_bytes = (bytes_per_weight(quantise) if quantise else 4.0) * matrices * _SIDE**2
    return Speed(
        count=count,
        threads=threads,
        flops_per_s=flops / _shortest_s(shares, _computing(), (_ROWS, _WIDTH), quantise),
        bytes_per_s=read_bytes / _shortest_s(shares, _reading(matrices), (1, _SIDE), quantise),
    )


def _shortest_s(
    shares: Sequence[tuple[int, ...]], model: ir.Model, shape: tuple[int, int], quantise: WeightDtype | None
) -> float:
    """The seconds of a run while all workers run: the mean of their shortest."""
    value = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    ready = threading.Barrier(len(shares))
    workers = [ThreadPoolExecutor(1, "calibrate", partial(pin, share)) for share in shares]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "stage.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        stage = StageFile(0, file, file.parent, ())
        try:
            taken = [
                worker.submit(_of_worker, stage, share, value, quantise, ready)
                for worker, share in zip(workers, shares, strict=True)
            ]
            return statistics.mean(one.result() for one in taken)
        finally:
            for worker in workers:
                worker.shutdown()


def _of_worker(
    stage: StageFile, cores: tuple[int, ...], value: Array, quantise: WeightDtype | None, ready: threading.Barrier
) -> float:
    try:
        engine = engine_factory("onnxruntime")(stage, CpuDevice(cores), None, quantise)
    except BaseException:
        ready.abort()
        raise
    run: Callable[[], object] = partial(engine.run, {"x": value}, engine.output_names)
    try:
        run()
        ready.wait()
        taken: list[float] = []
        stop_s = perf_counter() + _POINT_S
        while len(taken) < _MIN_RUNS or perf_counter() < stop_s:
            began = perf_counter()
            run()
            taken.append(perf_counter() - began)
    finally:
        engine.close()
    return min(taken[:-1])  # others only make it longer; the last may run after the other workers


@dataclass
class _Chain:
    """A graph of one input that grows by operators, each reading the last one's output."""

    width: int
    rows: int

    def __post_init__(self) -> None:
        self.value = ir.val("x", ir.DataType.FLOAT, ir.Shape([self.rows, self.width]))
        self.input, self.nodes, self.weights = self.value, list[ir.Node](), list[ir.Value]()
        self.draw = np.random.default_rng(0)

    def weight(self, *shape: int) -> ir.Value:
        """Random values that keep what they multiply near its size."""
        values = self.draw.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
        name = f"weight.{len(self.weights)}"
        found = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        found.shape, found.dtype = ir.Shape(shape), ir.DataType.FLOAT
        self.weights.append(found)
        return found

    def then(self, operator: str, *others: ir.Value) -> ir.Value:
        """Apply an operator to the last output and these."""
        node = ir.node(operator, [self.value, *others])
        self.nodes.append(node)
        self.value = node.outputs[0]
        return self.value

    def model(self) -> ir.Model:
        """The model of it all."""
        self.value.name, self.value.dtype = "y", ir.DataType.FLOAT
        self.value.shape = ir.Shape([self.rows, self.width])
        graph = ir.Graph(
            [self.input],
            [self.value],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 21},
            name="speed",
        )
        return ir.Model(graph, ir_version=10)


def _computing() -> ir.Model:
    chain = _Chain(_WIDTH, _ROWS)
    for _ in range(_LAYERS):
        before = chain.value
        chain.then("LayerNormalization", chain.weight(_WIDTH))
        chain.then("MatMul", chain.weight(_WIDTH, 4 * _WIDTH))
        chain.then("Gelu")
        chain.then("MatMul", chain.weight(4 * _WIDTH, _WIDTH))
        chain.then("Add", before)
    return chain.model()


def _reading(matrices: int) -> ir.Model:
    chain = _Chain(_SIDE, 1)
    for _ in range(matrices):
        chain.then("MatMul", chain.weight(_SIDE, _SIDE))
    return chain.model()


def _file(quantise: WeightDtype | None) -> Path:
    return user_cache() / "speeds" / Machine.here(quantise).file


def _read(quantise: WeightDtype | None) -> tuple[Speed, ...]:
    """What was measured before: nothing if the file is absent, or is not as this version writes it."""
    try:
        kept = _Speeds.model_validate_json(_file(quantise).read_text())
    except (OSError, ValueError):
        return ()
    return kept.speeds if kept.machine == Machine.here(quantise) else ()


def _write(quantise: WeightDtype | None, speeds: Sequence[Speed]) -> None:
    """Keep them, written aside and then renamed; a cache that cannot be written is done without."""
    file = _file(quantise)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    kept = _Speeds(machine=Machine.here(quantise), speeds=tuple(speeds))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(kept.model_dump_json(indent=1, by_alias=True))
        aside.replace(file)
    except OSError:
        with suppress(OSError):
            aside.unlink()

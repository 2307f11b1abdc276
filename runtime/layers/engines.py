"""Engines that tell how long each of their layers took, and what they hold: one class each.

ONNX Runtime writes down what its profiler saw, OpenVINO has counters, TensorRT reports to an `IProfiler`. Timing itself
takes time, which the layers' times do not hold.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stageline.models.errors import EngineError
from stageline.runtime.engines import Engine, StageFile, engine_factory
from stageline.runtime.engines.base import CacheSize, Device, WeightDtype
from stageline.runtime.planning.profile import Machine

_HALF_US = 0.5e-6
Run = dict["Name", float]
"""Seconds of each layer in one run."""


class Name(NamedTuple):
    """A layer under its engine's name, its kind, and the type that it computes in."""

    name: str
    kind: str
    precision: str


class TimedEngine(Protocol):
    """An open stage whose layers are timed. It belongs to the thread that opened it."""

    @property
    def engine(self) -> Engine:
        """The stage itself, to run it."""
        ...

    @property
    def machine(self) -> Machine:
        """What the times hold for."""
        ...

    def ran(self) -> None:
        """To be called after each run."""
        ...

    def close(self) -> tuple[list[Run], Mapping[str, int]]:
        """Free the engine; the layers of each run, in their order, and the bytes of its weights by type."""
        ...


class _OnnxRuntime:
    def __init__(
        self, stage: StageFile, device: Device, cache: CacheSize | None, quantise: WeightDtype | None, scratch: Path
    ) -> None:
        from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine, session_options

        options = session_options(stage, device.cores)
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / f"times-{stage.number}")
        # The graph after the session's own optimisations, weights beside it.
        self._graph = scratch / f"optimised-{stage.number}.onnx"
        options.optimized_model_filepath = str(self._graph)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{self._graph.name}.data"
        )
        self.engine = OnnxRuntimeEngine(stage, device, cache, quantise, options)
        self.machine = Machine.here(quantise)

    def ran(self) -> None:
        """The profiler counts by itself."""

    def close(self) -> tuple[list[Run], Mapping[str, int]]:
        events = json.loads(self.engine.end_profiling().read_bytes())
        self.engine.close()
        return _runs_in(events), _weights_in(self._graph)


def _runs_in(events: list[dict[str, Any]]) -> list[Run]:
    """The layers of each run, from the profiler's events: `model_run` spans the kernels of its run."""
    runs = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one["name"] == "model_run")
    found: list[Run] = [defaultdict(float) for _ in runs]
    kernels = sorted(
        (one for one in events if one["cat"] == "Node" and one["name"].endswith("_kernel_time")),
        key=lambda one: one["ts"],
    )
    place = 0
    for one in kernels:
        while place < len(runs) and one["ts"] > runs[place][1]:
            place += 1
        if place < len(runs) and one["ts"] >= runs[place][0]:
            about = one["args"]
            kind = str(about["op_name"])
            name = one["name"].removesuffix("_kernel_time") or f"{kind} {about.get('node_index', '')}"
            found[place][Name(name, kind, _precision(about))] += one["dur"] / 1e6
    return found


_FLOATS = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "double": "float64"}


def _precision(about: Mapping[str, Any]) -> str:
    """The first floating type that a kernel reads or writes, else the first type: `about` has lists like
    [{"float": [8, 384]}, ...]."""
    types = [dtype for what in ("input", "output") for one in about.get(f"{what}_type_shape", []) for dtype in one]
    return next((_FLOATS[one] for one in types if one in _FLOATS), types[0] if types else "-")


def _weights_in(graph: Path) -> dict[str, int]:
    """Bytes of an ONNX graph's initializers by type, subgraphs included."""
    import onnx_ir as ir

    found: dict[str, int] = defaultdict(int)
    for one in ir.load(graph).graphs():
        for value in one.initializers.values():
            if value.const_value is not None:
                dtype = value.const_value.dtype.name.lower()
                found[_FLOATS.get(dtype, dtype)] += value.const_value.nbytes
    return dict(found)


class _OpenVino:
    def __init__(
        self, stage: StageFile, device: Device, cache: CacheSize | None, quantise: WeightDtype | None, scratch: Path
    ) -> None:
        from stageline.runtime.engines.openvino import OpenVinoEngine

        self.engine = OpenVinoEngine(stage, device, cache, quantise, {"PERF_COUNT": True})
        self._totals: Run = {}
        self.machine = Machine.here(quantise, "openvino")
        self._runs: list[Run] = []

    def ran(self) -> None:
        # A counter is the mean of all runs so far, in whole microseconds.
        number, run = len(self._runs) + 1, Run()
        for one in self.engine.counters():
            if one.status.name == "EXECUTED":
                name = Name(one.node_name, one.node_type, _type_name(one.exec_type.rpartition("_")[2].lower()))
                total = number * (one.real_time.total_seconds() + _HALF_US)
                run[name] = total - self._totals.get(name, 0.0)
                self._totals[name] = total
        self._runs.append(run)

    def close(self) -> tuple[list[Run], Mapping[str, int]]:
        found: dict[str, int] = defaultdict(int)
        for node in self.engine.runtime_model().get_ops():
            if str(node.get_rt_info()["layerType"].value) == "Const":
                output = node.output(0)
                found[_type_name(output.get_element_type().get_type_name())] += output.get_tensor().size
        self.engine.close()
        return self._runs, {dtype: size for dtype, size in found.items() if size}


def _type_name(short: str) -> str:
    """OpenVINO's f32 -> float32."""
    found = re.fullmatch(r"(bf|f|i|u)(\d+)", short)
    return {"bf": "bfloat", "f": "float", "i": "int", "u": "uint"}[found[1]] + found[2] if found else short


class _TensorRt:
    def __init__(
        self, stage: StageFile, device: Device, cache: CacheSize | None, quantise: WeightDtype | None, scratch: Path
    ) -> None:
        from stageline.runtime.builder.report import EngineReport
        from stageline.runtime.devices.cuda.device import CudaDevice
        from stageline.runtime.engines.tensorrt.engine import open_tensorrt

        self.engine = open_tensorrt(stage, device, cache, quantise)
        assert isinstance(device, CudaDevice)
        record = self.engine.record
        gpu = device.gpu.driver.name(device.gpu.ordinal)
        self.machine = Machine(cpu=gpu, cores=os.cpu_count() or 1, engine=record.flavour, engine_version=record.version)
        self._weights: dict[str, int] = {}
        self._named: dict[str, Name] = {}
        try:
            report = EngineReport.model_validate_json((stage.folder / record.report.path).read_bytes())
        except (OSError, ValueError):  # without it layers have names only
            pass
        else:
            self._weights = {record.precision: report.weight_bytes}
            self._named = {
                one.name: Name(one.name, one.kind, (*one.dtypes, record.precision)[0].lower()) for one in report.layers
            }
        self._precision = record.precision
        self._runs: list[Run] = []
        self._run: Run = defaultdict(float)
        self.engine.time_layers(self._took)

    def _took(self, layer: str, seconds: float) -> None:
        self._run[self._named.get(layer, Name(layer, "", self._precision))] += seconds

    def ran(self) -> None:
        self._runs.append(self._run)
        self._run = defaultdict(float)

    def close(self) -> tuple[list[Run], Mapping[str, int]]:
        self.engine.close()
        return self._runs, self._weights


_TIMED: dict[str, Callable[..., TimedEngine]] = {
    "onnxruntime": _OnnxRuntime, "openvino": _OpenVino, "tensorrt": _TensorRt
}  # fmt: skip
TIMED = tuple(_TIMED)
"""The engines whose layers can be timed."""


def open_timed(
    name: str,
    stage: StageFile,
    device: Device,
    cache: CacheSize | None,
    quantise: WeightDtype | None,
    scratch: Path,
) -> TimedEngine:
    """A stage of the engine `name`, one of TIMED; files that it writes go to `scratch`, which must last until it is
    closed. EngineError if it is not installed, or refuses the stage."""
    engine_factory(name)  # says how to install it
    return _TIMED[name](stage, device, cache, quantise, scratch)


def check_timed(name: str) -> None:
    """EngineError if the layers of the engine `name` cannot be timed."""
    if name not in _TIMED:
        raise EngineError(f"the layers of {name} cannot be timed; engines whose layers can: {', '.join(_TIMED)}")

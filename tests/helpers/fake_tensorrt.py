"""A fake TensorRT: an engine file is the ONNX graph that TensorRT would have parsed, with its profiles; its kernels
are ONNX Runtime's on a CPU, run in the streams of a FakeDriver. `build` puts such plans into a bundle.

It is as strict as TensorRT: shapes have to be in the profile, every address has to be given and aligned, an output of a
cache has to be at its input, contexts need the scratch memory that the engine asked for, plans are read from a stream
that its base class knows, and host code is refused unless it is allowed. As TensorRT-RTX it compiles kernels when they
are first needed: lazily unless told otherwise, so that a graph which holds the slow ones is a hazard. As TensorRT it
has none of the names that only TensorRT-RTX has. tests/reality/test_tensorrt_names.py compares both with the real ones.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from fake_cuda import FakeDriver, HazardError
from stageline.runtime.builder.profiles import narrowed, profiles_of, shapes
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.engines.base import StageFile
from stageline.runtime.engines.tensorrt.guard import weight_digests
from stageline.runtime.engines.tensorrt.lower import Lowered, Precision, lower
from stageline.runtime.engines.tensorrt.records import EngineRecord, EnginesManifest, Options
from stageline.runtime.engines.tensorrt.store import FOLDER, MANIFEST
from stageline.runtime.workload import Workload

SCRATCH_BYTES = 4096
LAYERS = ("a product", "attention")
"""What a profiler is told of, a quarter of a millisecond each."""
VERSION = "1.7.1.116"
_SESSION = ort.InferenceSession


def build(
    bundle: Path,
    load: Workload,
    target: str = "sm89",
    precision: Precision = "fp32",
    stripped: bool = False,
    version_compatible: bool = False,
) -> None:
    """Give every stage of the bundle an engine."""
    options = Options(stripped=stripped, version_compatible=version_compatible)
    opened = Bundle.open(bundle)
    manifest, records = opened.manifest, []
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    (bundle / FOLDER).mkdir(exist_ok=True)
    for number, stage in enumerate(manifest.stages):
        lowered = lower(
            StageFile(number, bundle / stage.file, bundle, stage.caches), precision, load.capacity, stripped
        )
        profiles = narrowed(profiles_of(manifest, load), lowered.inputs)
        ranges = [
            {spec.name: [one[0], one[2]] for spec in lowered.inputs for one in [shapes(spec, profile)]}
            for profile in profiles
        ]
        caches = {
            name: f"{name}.present" for cache in lowered.caches for name in (f"{cache.name}.key", f"{cache.name}.value")
        }
        document = {"profiles": ranges, "caches": caches, "host code": version_compatible}
        head = json.dumps(document).encode()
        plan = _entry(
            bundle, f"{FOLDER}/{number}.plan", len(head).to_bytes(4, "big") + head + _whole(lowered, stripped)
        )
        records.append(
            EngineRecord(
                stage=stage.file,
                plan=plan,
                report=_entry(bundle, f"{FOLDER}/{number}.json", b"{}"),
                key="0" * 64,
                graph_sha256=digests[stage.file] or "",
                weight_files=weight_digests(manifest),
                flavour="tensorrt-rtx",
                version=VERSION,
                target=target,
                precision=precision,
                computes=str(lowered.computes.numpy()),
                options=options,
                profiles=profiles,
                inputs=lowered.inputs,
                outputs=lowered.outputs,
                weights=lowered.weight_specs if stripped else (),
                capacity=load.capacity if lowered.caches else None,
                caches=lowered.caches,
                build_s=0,
            )
        )
    engines = EnginesManifest(engines=tuple(records))
    (bundle / MANIFEST).write_text(engines.model_dump_json(exclude_none=True))


def _entry(bundle: Path, path: str, data: bytes) -> FileEntry:
    (bundle / path).write_bytes(data)
    return FileEntry(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _whole(lowered: Lowered, stripped: bool) -> bytes:
    """The graph as ONNX bytes, its weights inside unless it is stripped of them."""
    import onnx

    proto = onnx.load_from_string(lowered.proto)
    if not stripped:
        for initializer in proto.graph.initializer:
            if initializer.name in lowered.weights:
                array = lowered.weights[initializer.name].read()
                initializer.CopyFrom(ir.to_proto(ir.tensor(array, name=initializer.name)))
    return bytes(proto.SerializeToString())


class FakeTensorRT:
    """The module, on a FakeDriver."""

    class ILogger:
        ERROR = 1

        def __init__(self) -> None:
            self.made = True

    class IStreamReaderV2:
        def __init__(self) -> None:
            self.made = True

    class IProfiler:
        def __init__(self) -> None:
            self.made = True

    class SeekPosition(IntEnum):
        SET, CUR, END = range(3)

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.contexts = 0
        """How many were made."""
        self.refuse = ""
        """What is to be refused, and so logged: `plan`, `run`, `shape` or `capture`. `silently`: a run, not logged.
        `asked`: capture, by a context of TensorRT-RTX that is asked before. `memory`: another context."""
        self.compiled: list[str] = []
        """The kernels that were compiled, not found in a cache."""

    def Runtime(self, logger: Any) -> "_Runtime":  # noqa: N802
        if not getattr(logger, "made", False):
            raise TypeError("__init__() must be called when overriding __init__")
        return _Runtime(self, logger)


class FakeTensorRTRtx(FakeTensorRT):
    """TensorRT-RTX's module."""

    class DynamicShapesKernelSpecializationStrategy:
        LAZY, EAGER, NONE = "lazy", "eager", "none"


class _Runtime:
    engine_host_code_allowed = False

    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        self.module, self.logger = module, logger

    def deserialize_cuda_engine(self, reader: Any) -> "_Engine | None":
        if not (isinstance(reader, FakeTensorRT.IStreamReaderV2) and reader.made):
            raise TypeError("deserialize_cuda_engine(): incompatible function arguments")
        if self.module.refuse == "plan":
            self.logger.log(1, "[runtime.cpp::parsePlan::318]  Error Code 1: the plan is not mine")
            return None
        engine = _Engine(self, _read(reader))
        if engine.host_code and not self.engine_host_code_allowed:
            self.logger.log(1, "Deserialization of an engine with host code is not allowed by this runtime")
            return None
        return engine


def _read(reader: Any) -> bytes:
    """A whole plan: its header first, then from the start on, asking again for what is missing."""
    where = FakeTensorRT.SeekPosition
    assert len(reader.read(4, 0)) == 4
    assert reader.seek(-4, where.CUR)
    assert reader.seek(0, where.END)
    assert reader.read(1, 0) == b""
    assert reader.seek(0, where.SET)
    return b"".join(iter(lambda: reader.read(1 << 40, 0), b""))


class _Config:
    strategy: str | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class _KernelCache:
    """Names of compiled kernels. It takes those of this version alone."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview(json.dumps([VERSION, sorted(self.kernels)]).encode())

    def deserialize(self, data: bytes) -> bool:
        version, kernels = json.loads(data)
        if version == VERSION:
            self.kernels = set(kernels)
        return bool(version == VERSION)


class _RtxConfig(_Config):
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: _KernelCache | None = None

    def create_runtime_cache(self) -> _KernelCache:
        return _KernelCache()

    def set_runtime_cache(self, cache: _KernelCache) -> bool:
        self.cache = cache
        return True


class _Engine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, runtime: _Runtime, plan: bytes) -> None:
        end = 4 + int.from_bytes(plan[:4], "big")
        head = json.loads(plan[4:end])
        self.runtime, self.profiles, self.presents = runtime, head["profiles"], head["caches"]
        self.host_code = head["host code"]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = _SESSION(plan[end:], options, providers=["CPUExecutionProvider"])

    def create_runtime_config(self) -> _Config:
        return _RtxConfig() if isinstance(self.runtime.module, FakeTensorRTRtx) else _Config()

    def create_execution_context(self, config: _Config) -> "_Context | None":
        assert config.strategy == "user managed"
        if self.runtime.module.refuse == "memory":
            return None
        self.runtime.module.contexts += 1
        return _RtxContext(self, config) if isinstance(config, _RtxConfig) else _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.driver = engine, engine.runtime.module.driver
        self.active_optimization_profile = 0
        self.scratch = 0
        self.profiler: Any = None
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.inputs = {value.name: value for value in engine.session.get_inputs()}
        self.outputs = {value.name: value for value in engine.session.get_outputs()}

    def refuse(self, message: str) -> bool:
        self.engine.runtime.logger.log(1, message)
        return False

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH_BYTES
        self.scratch = address

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile = profile
        self.shapes.clear()
        return profile < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.engine.profiles[self.active_optimization_profile].get(name, (shape, shape))
        if self.engine.runtime.module.refuse == "shape" or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            return self.refuse(f"{name}: {shape} is not in profile {self.active_optimization_profile}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256:
            return self.refuse(f"the address of {name} is not aligned")
        self.addresses[name] = address
        return name in self.inputs or name in self.outputs

    def infer_shapes(self) -> list[str]:
        for name, value in self.inputs.items():
            if name not in self.shapes and not any(isinstance(size, str) for size in value.shape):
                self.shapes[name] = tuple(value.shape)
        return [name for name in self.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            free: size
            for value in self.inputs.values()
            for free, size in zip(value.shape, self.shapes[value.name], strict=True)
        }
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.outputs[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        module = self.engine.runtime.module
        if module.refuse == "run":
            return self.refuse("[executionContext.cpp::enqueue::1] Error Code 1:\n cask failed")
        if module.refuse == "silently":
            return False
        if self.capturing(stream) and module.refuse == "capture":
            return self.refuse("operation not permitted when stream is capturing")
        missing = [name for name in (*self.inputs, *self.outputs) if name not in self.addresses]
        if missing or not self.scratch:
            raise HazardError(f"no address for {missing or 'scratch memory'}")
        for past, present in self.engine.presents.items():
            if self.addresses[past] != self.addresses[present]:
                raise HazardError(f"{present} is not at the address of {past}")
        given = {name: self._place(value, self.shapes[name]) for name, value in self.inputs.items()}
        taken = {name: self._place(value, self.get_tensor_shape(name)) for name, value in self.outputs.items()}

        def run() -> None:
            names = list(taken)
            results = self.engine.session.run(
                names, {name: self._array(*place).copy() for name, place in given.items()}
            )
            for name, result in zip(names, results, strict=True):
                self._array(*taken[name])[...] = result

        self.driver.kernel(
            stream, [place[0] for place in given.values()], [*(p[0] for p in taken.values()), self.scratch], run
        )
        if self.profiler is not None:
            assert not self.capturing(stream), "the layers of a graph are not reported"
            self.driver.synchronize(stream)
            assert self.profiler.made
            for layer in LAYERS:
                self.profiler.report_layer_time(layer, 0.25)
        return True

    def capturing(self, stream: int) -> bool:
        return self.driver._streams[stream].captured is not None

    def _place(self, value: Any, shape: tuple[int, ...]) -> tuple[int, np.dtype[Any], tuple[int, ...]]:
        names: Mapping[str, str] = {"float": "float32", "float16": "float16", "int64": "int64", "bool": "bool"}
        return self.addresses[value.name], np.dtype(names[value.type[7:-1]]), shape

    def _array(self, address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        return self.driver.array(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


class _RtxContext(_Context):
    """Compiles its kernels for the shapes of a run."""

    def __init__(self, engine: _Engine, config: _RtxConfig) -> None:
        super().__init__(engine)
        assert config.cache is not None
        self.lazy = config.dynamic_shapes_kernel_specialization_strategy == "lazy"
        self.known = config.cache.kernels

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.runtime.module.refuse != "asked"

    def execute_async_v3(self, stream: int) -> bool:
        module = self.engine.runtime.module
        if self.capturing(stream) and module.refuse == "asked":
            raise HazardError("a context is captured that said it cannot be")
        kernel = str(sorted(self.shapes.items()))
        if kernel not in self.known:
            if self.capturing(stream):
                raise HazardError("a graph is captured of kernels that are not compiled yet")
            module.compiled.append(kernel)
        if not self.lazy:
            self.known.add(kernel)  # a lazy one is there some runs later: no graph may hold what stands in for it
        return super().execute_async_v3(stream)

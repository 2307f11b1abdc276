"""ONNX Runtime on a GPU, in the stage's own stream (`user_compute_stream`), with all inputs and outputs bound in place.

Values of other stages are bound without a copy; outputs are in buffers of the GPU's pool. Inputs from the host (token
ids and lengths: a few hundred bytes) are bound in host memory: ONNX Runtime computes lengths on the CPU, must read them
before it can enqueue, and copies what its kernels need itself. `run` does not wait for the kernels to end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, CacheSpec
from stageline.runtime.devices.base import Array, Value
from stageline.runtime.devices.cuda.arrays import CudaArray, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.base import CacheSize, Device, StageFile, WeightDtype
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import root_of
from stageline.runtime.engines.lowering.group_query import padded
from stageline.runtime.engines.lowering.onnxruntime import first_line, lowered

_CACHE = np.dtype("float16")  # the operator has no float32 kernel on GPUs
_TYPES: dict[str, np.dtype[Any]] = {
    f"tensor({onnx})": np.dtype(name)
    for onnx, name in (
        ("float", "float32"),
        ("float16", "float16"),
        ("double", "float64"),
        ("int64", "int64"),
        ("int32", "int32"),
        ("bool", "bool"),
    )
}


class OnnxRuntimeCudaEngine:
    """One stage in an ONNX Runtime session on a GPU. Keeps the promises of `Engine`. Attention with a cache computes in
    float16, as its operator requires; everything else in the graph's types, bfloat16 in float32."""

    max_rows = None

    def __init__(
        self, stage: StageFile, device: Device, cache: CacheSize | None = None, quantise: WeightDtype | None = None
    ) -> None:
        """Open the stage. EngineError if ONNX Runtime refuses it or has no CUDA, or there is no memory for its
        caches."""
        if not isinstance(device, CudaDevice):
            raise EngineError(
                f"the engine onnxruntime-cuda runs on cuda:N, not on {device.name}; open with devices=['cuda:0']"
            )
        if cache is not None and cache.dtype not in (None, "float16"):
            raise EngineError(f"on a GPU caches are float16, not {cache.dtype}; leave cache_dtype out")
        self._number, self._device, self._specs = stage.number, device, stage.caches
        try:
            device.gpu.make_current()
            self._session = _session(stage, device, quantise)
            hidden = {name for spec in stage.caches for name in (*past_names(spec.name), *present_names(spec.name))}
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            self.input_names = tuple(value.name for value in inputs if value.name not in hidden)
            self.output_names = tuple(value.name for value in outputs if value.name not in hidden)
            self._shapes = {value.name: tuple(value.shape) for value in (*inputs, *outputs)}
            self._dtypes = {value.name: _TYPES[value.type] for value in (*inputs, *outputs) if value.name not in hidden}
            self._size = cache
            self._slot_shapes = {
                name: _shape(spec, cache.slots, cache.capacity)
                for spec in stage.caches
                for name in past_names(spec.name)
                if cache is not None
            }
            self._slots = {n: device.zeroed(size_bytes(shape, _CACHE)) for n, shape in self._slot_shapes.items()}
        except CudaError as error:
            raise device.failed(error) from error
        self._options = _run_options()

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        """See `Engine.run`."""
        with Launch(self._device, f"stage {self._number} run") as launch:
            sizes = self._sizes(inputs)
            caches: dict[str, tuple[int, tuple[int, ...]]] = {}
            pairs: dict[tuple[int, ...], list[Buffer]] = {}  # one pair serves all layers of its shape
            for spec in self._specs:
                shape = _shape(spec, sizes[BATCH], sizes[LENGTH])
                pair = pairs.setdefault(shape, [launch.take(shape, _CACHE) for _ in range(2)])
                caches.update((n, (b.address, shape)) for n, b in zip(past_names(spec.name), pair, strict=True))
            return self._launched(launch, inputs, outputs, caches, sizes)

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], first_slot: int) -> Mapping[str, Value]:
        """See `Engine.step`."""
        with Launch(self._device, f"stage {self._number} step") as launch:
            assert self._size is not None
            sizes, caches = self._sizes(inputs), {}
            for spec in self._specs:
                shape = _shape(spec, sizes[BATCH], self._size.capacity)
                offset = first_slot * size_bytes(shape[1:], _CACHE)
                for name in past_names(spec.name):
                    caches[name] = (self._slots[name].address + offset, shape)
            return self._launched(launch, inputs, outputs, caches, sizes)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`. It runs in the stage's stream."""
        driver, stream = self._device.gpu.driver, self._device.stream
        assert self._size is not None
        try:
            self._device.gpu.make_current()
            for spec in self._specs:
                _, heads, capacity, size = _shape(spec, 1, self._size.capacity)
                token_bytes = size * _CACHE.itemsize
                pitch = capacity * token_bytes
                for name in past_names(spec.name):
                    to, of = (self._slots[name].address + slot * heads * pitch for slot in (target, source))
                    driver.copy_rows(to, of, pitch, tokens * token_bytes, heads, stream)
        except CudaError as error:
            raise self._device.failed(error) from error

    def give_caches(self) -> Mapping[str, Value]:
        """See `Engine.give_caches`."""
        slots, self._slots = self._slots, {}
        return self._device.arrays(slots, self._slot_shapes, _CACHE)

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        with Launch(self._device, f"stage {self._number}") as launch:
            self._slots = launch.adopt(caches, self._slot_shapes, _CACHE)
            launch.end()

    def close(self) -> None:
        """Wait for running work, and free the session and the caches. May be called again."""
        if self._session is None:
            return
        try:
            self._device.gpu.make_current()
            self._device.gpu.driver.synchronize(self._device.stream)
        except (CudaError, EngineError):
            pass  # the GPU is lost, and whoever waited has got the error
        self._session, self._slots = None, {}

    def _launched(
        self,
        launch: Launch,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        caches: Mapping[str, tuple[int, tuple[int, ...]]],
        sizes: Mapping[str, int],
    ) -> Mapping[str, Value]:
        """Bind everything and run. `caches`: address and shape of each."""
        ordinal, binding = self._device.gpu.ordinal, self._session.io_binding()
        alive: list[Array | CudaArray] = []
        for name in self.input_names:
            value, dtype = inputs[name], self._dtypes[name]
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value, dtype)
                alive.append(array)
                binding.bind_input(name, "cpu", 0, dtype.type, array.shape, array.ctypes.data)
            else:
                local = launch.local(value, dtype)
                alive.append(local)
                binding.bind_input(name, "cuda", ordinal, dtype.type, local.shape, local.buffer.address)
        for spec in self._specs:
            for past, present in zip(past_names(spec.name), present_names(spec.name), strict=True):
                address, shape = caches[past]
                binding.bind_input(past, "cuda", ordinal, _CACHE.type, shape, address)
                binding.bind_output(present, "cuda", ordinal, _CACHE.type, shape, address)
        buffers: dict[str, tuple[Buffer, tuple[int, ...]]] = {}
        for name in outputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in self._shapes[name])
            buffers[name] = launch.take(shape, self._dtypes[name]), shape
            address = buffers[name][0].address
            binding.bind_output(name, "cuda", ordinal, self._dtypes[name].type, shape, address)
        launch.begin()
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(
                f"stage {self._number} failed in ONNX Runtime on {self._device.name}: {first_line(error)}"
            ) from error
        self._device.gpu.make_current()  # ONNX Runtime may have changed the thread's device
        done = launch.end()
        return {
            name: CudaArray(self._device, buffer, shape, self._dtypes[name], done)
            for name, (buffer, shape) in buffers.items()
        }

    def _sizes(self, inputs: Mapping[str, Value]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name in self.input_names:
            known = zip(self._shapes[name], inputs[name].shape, strict=True)
            sizes.update((d, size) for d, size in known if isinstance(d, str))
        return sizes


def _shape(spec: CacheSpec, rows: int, tokens: int) -> tuple[int, int, int, int]:
    return rows, spec.heads, tokens, padded(max(spec.key_size, spec.value_size))


def _session(stage: StageFile, device: CudaDevice, quantise: WeightDtype | None) -> Any:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineError('this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then pip install "stageline[gpu]"')
    cuda = {
        "device_id": str(device.gpu.ordinal),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",  # leave room for the pipeline's own buffers
        "use_tf32": "0",
    }
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: errors are raised
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root_of(stage.folder)))
    providers: list[Any] = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    try:
        # Few kernels take bfloat16.
        graph = lowered(stage, {ir.DataType.BFLOAT16}, ir.DataType.FLOAT16, quantise)
        session = ort.InferenceSession(graph, options, providers=providers)
    except EngineError:
        raise
    except Exception as error:  # the backend's exceptions have no common base
        raise EngineError(f"stage {stage.number} ({stage.file.name}) did not open: {first_line(error)}") from error
    if "CUDAExecutionProvider" not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime could not start CUDA on {device.name}: its CUDA or cuDNN libraries are missing or "
            "of another version; see: stageline doctor"
        )
    return session


def _run_options() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options

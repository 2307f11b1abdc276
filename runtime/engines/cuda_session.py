"""A session of ONNX Runtime on a GPU, in a stage's stream (`user_compute_stream`), with everything bound in place.

A binding holds what a run of one shape is bound to: a buffer for all inputs from the host, which come in one copy,
buffers for the values of other stages, and for the outputs. While anyone holds an output, the binding is not reused. A
run of a shape that comes again is a replay of a captured graph. A run neither waits for the GPU nor copies anything to
the host.

Values are copied to the binding's own addresses: in place, every address that they may have would need a graph.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Array, Value
from stageline.runtime.devices.cuda.arrays import CudaArray, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.graphs import Replay
from stageline.runtime.devices.cuda.launch import Launch, packed
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.cuda_provider import PROVIDER, cuda_runtime, why_not_started
from stageline.runtime.engines.lowering.onnxruntime import first_line

_BINDINGS = 16  # that are free and kept, of whatever shapes
_ONNX = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16}
"""ONNX's number of each type that is bound; NumPy has no bfloat16."""
_TYPES: dict[str, np.dtype[Any]] = {
    f"tensor({onnx})": np.dtype(name)
    for onnx, name in (
        ("float", "float32"),
        ("double", "float64"),
        ("int64", "int64"),
        ("int32", "int32"),
        ("bool", "bool"),
    )
}


@dataclass(frozen=True)
class State:
    """A buffer that is an input of the graph and an output of it as well. `kept`: by someone who outlives the runs;
    else it belongs to the binding."""

    past: str
    present: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    buffer: Buffer
    kept: bool


@dataclass(eq=False)
class _Binding:
    """What a run is bound to, and the replay of it. `offsets`: of each input from the host in `packed`."""

    io: Any
    replay: Replay
    packed: Buffer
    offsets: dict[str, int]
    values: dict[str, Buffer] = field(default_factory=dict)
    outputs: dict[str, Buffer] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)
    read_by_host: dict[str, Array] = field(default_factory=dict)


class _Lease:
    """Held by the outputs of a run; once the last of them is gone, the binding is free."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class _Inputs:
    """What a run is given: arrays from the host, arrays that the host itself reads, values on this GPU that are used
    where they lie, and all other values."""

    host: dict[str, Array]
    read_by_host: dict[str, Array]
    in_place: dict[str, CudaArray]
    values: dict[str, Value]

    @property
    def key(self) -> tuple[object, ...]:
        """Inputs of equal keys can be bound alike, but for the contents of what comes from elsewhere."""
        shapes = tuple((name, tuple(value.shape)) for name, value in (*self.host.items(), *self.values.items()))
        addresses = tuple((name, value.buffer.address, value.shape) for name, value in self.in_place.items())
        read = tuple(tuple(array.tolist()) for array in self.read_by_host.values())
        return shapes, tuple(self.values), addresses, read


class CudaSession:
    """A graph, open on a GPU. Used by the stage's worker; borrows the device, and owns its bindings until `close()`."""

    def __init__(self, device: CudaDevice, name: str, graph: bytes, folder: Path | None = None) -> None:
        """`name`: what errors and profilers call it; `folder`: of the graph's weights. EngineError if ONNX Runtime
        refuses the graph or has no CUDA."""
        self._device, self._name = device, name
        self._session = _opened(device, name, graph, folder)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.input_names = tuple(value.name for value in inputs)
        self.output_names = tuple(value.name for value in outputs)
        self._shapes = {value.name: tuple(value.shape) for value in (*inputs, *outputs)}
        self._dtypes = {v.name: _TYPES[v.type] for v in (*inputs, *outputs) if v.type in _TYPES}
        self._options = _run_options()
        self._free: list[tuple[object, _Binding]] = []  # by key, the last used at the end
        self._leased: set[_Binding] = set()

    def run(
        self,
        what: str,
        given: Mapping[str, Value],
        outputs: Sequence[str],
        states: Callable[[], list[State]] = list,
        read_by_host: Sequence[str] = (),
        in_place: Sequence[str] = (),
    ) -> dict[str, CudaArray]:
        """The named outputs, for inputs by their names. `states` makes those of a new binding for this kind of run,
        `what`; `read_by_host` names inputs that stay in host memory, `in_place` those that come from few addresses of
        this GPU."""
        device = self._device
        with Launch(device, f"{self._name} {what}") as launch:
            found = self._sorted(given, read_by_host, in_place)
            key = (what, tuple(outputs), found.key)
            binding = self._taken(key) or self._bind(found, outputs, states(), self.sizes(given))
            lease = _Lease()
            self._leased.add(binding)
            weakref.finalize(lease, self._released, key, binding).atexit = False
            launch.upload_all(found.host, binding.packed, binding.offsets)
            for name, value in found.values.items():
                launch.put(value, binding.values[name], self._dtypes[name])
            for local in found.in_place.values():
                launch.local(local, local.dtype)
            for state in binding.states:
                if not state.kept:
                    launch.touch(state.buffer)
            for buffer in binding.outputs.values():
                launch.await_guards(buffer)
                launch.touch(buffer)
            launch.begin()
            binding.replay.run(0, partial(self._enqueue, binding.io))
            done = launch.end()
        return {
            name: CudaArray(device, buffer, binding.shapes[name], self._dtypes[name], done, lease)
            for name, buffer in binding.outputs.items()
        }

    def sizes(self, inputs: Mapping[str, Value]) -> dict[str, int]:
        """The sizes of the free dimensions of the graph's inputs, as far as these are given."""
        sizes: dict[str, int] = {}
        for name in self.input_names:
            if name in inputs:
                known = zip(self._shapes[name], inputs[name].shape, strict=True)
                sizes.update((d, size) for d, size in known if isinstance(d, str))
        return sizes

    def drop(self) -> None:
        """Drop all free bindings: what they are bound to changes."""
        while self._free:
            self._free.pop()[1].replay.close()

    def close(self) -> None:
        """Free the session and its graphs. No work may be running. May be called again."""
        self.drop()
        for binding in tuple(self._leased):
            binding.replay.close()
        self._session = None

    # Running.

    def _sorted(self, given: Mapping[str, Value], read_by_host: Sequence[str], in_place: Sequence[str]) -> _Inputs:
        host: dict[str, Array] = {}
        here: dict[str, CudaArray] = {}
        values: dict[str, Value] = {}
        for name in self.input_names:
            if name not in given:
                continue  # a state
            value, dtype = given[name], self._dtypes[name]
            if isinstance(value, np.ndarray):
                host[name] = np.ascontiguousarray(value, dtype)
            elif name in in_place and isinstance(value, CudaArray):
                here[name] = value
            else:
                values[name] = value
        return _Inputs(host, {name: host.pop(name) for name in read_by_host}, here, values)

    def _enqueue(self, io: Any) -> None:
        try:
            self._session.run_with_iobinding(io, self._options)
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(
                f"{self._name} failed in ONNX Runtime on {self._device.name}: {first_line(error)}"
            ) from error
        finally:
            self._device.gpu.make_current()  # ONNX Runtime may have changed the thread's device

    # Bindings.

    def _taken(self, key: object) -> _Binding | None:
        for place, (other, binding) in enumerate(self._free):
            if other == key:
                del self._free[place]
                return binding
        return None

    def _released(self, key: object, binding: _Binding) -> None:
        """Runs on any thread, at any moment."""
        self._leased.discard(binding)
        self._free.append((key, binding))

    def _bind(self, given: _Inputs, outputs: Sequence[str], states: list[State], sizes: Mapping[str, int]) -> _Binding:
        """A new binding; the one that was not used for longest makes room for it."""
        gpu = self._device.gpu
        while len(self._free) >= _BINDINGS:
            self._free.pop(0)[1].replay.close()
        io, replay = self._session.io_binding(), Replay(gpu.driver, self._device.stream)
        offsets, packed_bytes = packed(given.host)
        binding = _Binding(io, replay, gpu.memory.take(packed_bytes), offsets, states=states)

        def where(dtype: np.dtype[Any], shape: Sequence[int], address: int) -> tuple[Any, ...]:
            return "cuda", gpu.ordinal, _ONNX[dtype.name], list(shape), address

        for name, array in given.host.items():
            io.bind_input(name, *where(array.dtype, array.shape, binding.packed.address + offsets[name]))
        for name, array in given.read_by_host.items():
            binding.read_by_host[name] = array  # which must live as long
            io.bind_input(name, "cpu", 0, _ONNX[array.dtype.name], array.shape, array.ctypes.data)
        for name, local in given.in_place.items():
            io.bind_input(name, *where(local.dtype, local.shape, local.buffer.address))
        for name, value in given.values.items():
            buffer = binding.values[name] = gpu.memory.take(size_bytes(tuple(value.shape), self._dtypes[name]))
            io.bind_input(name, *where(self._dtypes[name], value.shape, buffer.address))
        for state in states:
            at = where(state.dtype, state.shape, state.buffer.address)
            io.bind_input(state.past, *at)
            io.bind_output(state.present, *at)
        for name in outputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in self._shapes[name])
            binding.shapes[name] = shape
            binding.outputs[name] = gpu.memory.take(size_bytes(shape, self._dtypes[name]))
            io.bind_output(name, *where(self._dtypes[name], shape, binding.outputs[name].address))
        return binding


def _opened(device: CudaDevice, name: str, graph: bytes, folder: Path | None) -> Any:
    ort = cuda_runtime()
    cuda = {
        "device_id": str(device.gpu.ordinal),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",  # leave room for the pipeline's own buffers
        "use_tf32": "0",
    }
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: errors are raised
    options.intra_op_num_threads = 1  # the host only computes shapes
    options.enable_mem_pattern = False  # or the second run of a shape would allocate, which a capture forbids
    # In ONNX Runtime 1.31 it overwrites shapes that the host still reads, in models with experts.
    options.enable_mem_reuse = False
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = ort.InferenceSession(graph, options, providers=[(PROVIDER, cuda), "CPUExecutionProvider"])
    except Exception as error:  # the backend's exceptions have no common base
        raise EngineError(f"{name} did not open: {first_line(error)}") from error
    if PROVIDER not in session.get_providers():
        raise EngineError(f"ONNX Runtime could not start CUDA on {device.name}: {why_not_started(device.gpu.ordinal)}")
    return session


def _run_options() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options

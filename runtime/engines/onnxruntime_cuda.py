"""ONNX Runtime on a GPU, in the stage's own stream (`user_compute_stream`), with all inputs and outputs bound in place.

A binding holds what a step of one shape is bound to: a buffer for all inputs from the host, which come in one copy, the
values of other stages where they lie, and buffers for the outputs. While anyone holds an output, the binding is not
reused. A step that comes again, with the same shapes and addresses, is a replay of a captured graph. A step neither
waits for the GPU nor copies anything to the host.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, NEW_LENGTHS, PAST_LENGTHS, CacheSpec
from stageline.runtime.devices.base import Array, Value, on_host
from stageline.runtime.devices.cuda.arrays import CudaArray, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.graphs import Replay
from stageline.runtime.devices.cuda.launch import Launch, packed
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.base import CacheSize, Device, StageFile, WeightDtype
from stageline.runtime.engines.cuda_provider import PROVIDER, cuda_runtime, why_not_started
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import root_of
from stageline.runtime.engines.lowering.flat_attention import padded_size
from stageline.runtime.engines.lowering.onnxruntime import first_line, lowered_for_cuda
from stageline.runtime.engines.lowering.paged import BLOCK, BOUNDS, PAGED_INPUTS, blocks, paged_inputs

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
class _Inputs:
    """What a step is given: arrays from the host, values on this GPU, and values that must be brought here. `bounds` is
    what the host reads of the caches' lengths."""

    host: dict[str, Array]
    here: dict[str, CudaArray]
    there: dict[str, Value]
    bounds: Array | None

    @property
    def key(self) -> tuple[object, ...]:
        """Inputs of equal keys can be bound alike, but for the contents of what comes from elsewhere."""
        shapes = tuple((name, tuple(value.shape)) for name, value in (*self.host.items(), *self.there.items()))
        addresses = tuple((name, value.buffer.address, value.shape) for name, value in self.here.items())
        return shapes, tuple(self.there), addresses, None if self.bounds is None else tuple(self.bounds.tolist())


@dataclass(eq=False)
class _Binding:
    """What a step is bound to, and the replay of it. `offsets`: of each input from the host in `packed`."""

    io: Any
    replay: Replay
    packed: Buffer
    offsets: dict[str, int]
    copied: dict[str, Buffer] = field(default_factory=dict)
    outputs: dict[str, Buffer] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    discarded: list[Buffer] = field(default_factory=list)
    bounds: Array | None = None


class _Lease:
    """Held by the outputs of a step; once the last of them is gone, the binding is free."""

    __slots__ = ("__weakref__",)


class OnnxRuntimeCudaEngine:
    """One stage in an ONNX Runtime session on a GPU. Keeps the promises of `Engine`.

    It computes in the bundle's type. Attention with a cache is float16 where that type is float32: its operator has no
    other kernels.
    """

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
        self._number, self._device, self._specs = stage.number, device, stage.caches
        try:
            device.gpu.make_current()
            self._session, self._cache_dtype = _session(stage, device, quantise)
            if cache is not None and cache.dtype not in (None, self._cache_dtype.name):
                raise EngineError(
                    f"on a GPU this bundle's caches are {self._cache_dtype}, not {cache.dtype}; leave cache_dtype out"
                )
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            hidden = {name for spec in stage.caches for name in (*past_names(spec.name), *present_names(spec.name))}
            self.input_names = tuple(v.name for v in inputs if v.name not in hidden and v.name not in PAGED_INPUTS)
            self.output_names = tuple(value.name for value in outputs if value.name not in hidden)
            self._shapes = {value.name: tuple(value.shape) for value in (*inputs, *outputs)}
            self._dtypes = {value.name: _TYPES[value.type] for value in (*inputs, *outputs) if value.name not in hidden}
            self._capacity = cache.capacity if cache is not None else 0
            self._slot_shapes: dict[str, tuple[int, ...]] = {
                name: self._cache_shape(spec, cache.slots * blocks(cache.capacity))
                for spec in stage.caches
                for name in past_names(spec.name)
                if cache is not None
            }
            self._slots = {n: device.zeroed(size_bytes(s, self._cache_dtype)) for n, s in self._slot_shapes.items()}
        except CudaError as error:
            raise device.failed(error) from error
        self._options = _run_options()
        self._free: list[tuple[object, _Binding]] = []  # by key, the last used at the end
        self._leased: set[_Binding] = set()
        self._closed = False

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        """See `Engine.run`."""
        return self._launched("run", self._placed(inputs, 0, None), outputs, None)

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], first_slot: int) -> Mapping[str, Value]:
        """See `Engine.step`."""
        return self._launched("step", self._placed(inputs, first_slot, self._capacity), outputs, self._slots)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`. It runs in the stage's stream."""
        driver, stream = self._device.gpu.driver, self._device.stream
        try:
            self._device.gpu.make_current()
            for name, buffer in self._slots.items():
                token_bytes = size_bytes(self._slot_shapes[name][2:], self._cache_dtype)
                slot_bytes = blocks(self._capacity) * BLOCK * token_bytes
                to, of = (buffer.address + slot * slot_bytes for slot in (target, source))
                driver.copy(to, of, tokens * token_bytes, stream)
        except CudaError as error:
            raise self._device.failed(error) from error

    def give_caches(self) -> Mapping[str, Value]:
        """See `Engine.give_caches`."""
        self._drop()
        slots, self._slots = self._slots, {}
        return self._device.arrays(slots, self._slot_shapes, self._cache_dtype)

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        self._drop()
        with Launch(self._device, f"stage {self._number}") as launch:
            self._slots = launch.adopt(caches, self._slot_shapes, self._cache_dtype)
            launch.end()

    def close(self) -> None:
        """Wait for running work, and free the session and the caches. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._device.gpu.make_current()
            self._device.gpu.driver.synchronize(self._device.stream)
            self._drop()
            for binding in tuple(self._leased):
                binding.replay.close()
        except (CudaError, EngineError):
            pass  # the GPU is lost, and whoever waited has got the error
        self._session, self._slots = None, {}

    # Running.

    def _placed(self, inputs: Mapping[str, Value], first_slot: int, capacity: int | None) -> Mapping[str, Value]:
        """The inputs, and where in the caches their rows lie. `capacity`: of a slot; None: the length of the rows."""
        if not self._specs:
            return inputs
        past, new = (on_host(inputs, [name])[name] for name in (PAST_LENGTHS, NEW_LENGTHS))
        length = self._sizes(inputs)[LENGTH]
        return {**inputs, **paged_inputs(past, new, length, first_slot, capacity or length)}

    def _launched(
        self, what: str, given: Mapping[str, Value], outputs: Sequence[str], caches: Mapping[str, Buffer] | None
    ) -> Mapping[str, Value]:
        """Run with these inputs, those of `paged_inputs` included. `caches`: the slots; None: they are discarded."""
        device = self._device
        with Launch(device, f"stage {self._number} {what}") as launch:
            found = self._sorted(given)
            key = (what, tuple(outputs), found.key)
            binding = self._taken(key) or self._bind(found, outputs, caches, self._sizes(given))
            lease = _Lease()
            self._leased.add(binding)
            weakref.finalize(lease, self._released, key, binding).atexit = False
            launch.upload_all(found.host, binding.packed, binding.offsets)
            for name, value in found.there.items():
                launch.put(value, binding.copied[name], self._dtypes[name])
            for local in found.here.values():
                launch.local(local, local.dtype)
            for buffer in binding.discarded:
                launch.touch(buffer)
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

    def _sorted(self, given: Mapping[str, Value]) -> _Inputs:
        host: dict[str, Array] = {}
        here: dict[str, CudaArray] = {}
        there: dict[str, Value] = {}
        for name in (*self.input_names, *(PAGED_INPUTS if self._specs else ())):
            value, dtype = given[name], self._dtypes[name]
            if isinstance(value, np.ndarray):
                host[name] = np.ascontiguousarray(value, dtype)
            elif isinstance(value, CudaArray) and value.device.gpu is self._device.gpu and value.dtype == dtype:
                here[name] = value
            else:
                there[name] = value
        return _Inputs(host, here, there, host.pop(BOUNDS, None))

    def _enqueue(self, io: Any) -> None:
        try:
            self._session.run_with_iobinding(io, self._options)
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(
                f"stage {self._number} failed in ONNX Runtime on {self._device.name}: {first_line(error)}"
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

    def _bind(
        self, given: _Inputs, outputs: Sequence[str], caches: Mapping[str, Buffer] | None, sizes: Mapping[str, int]
    ) -> _Binding:
        """A new binding; the one that was not used for longest makes room for it."""
        gpu = self._device.gpu
        while len(self._free) >= _BINDINGS:
            self._free.pop(0)[1].replay.close()
        io, replay = self._session.io_binding(), Replay(gpu.driver, self._device.stream)
        offsets, packed_bytes = packed(given.host)
        binding = _Binding(io, replay, gpu.memory.take(packed_bytes), offsets)

        def where(dtype: np.dtype[Any], shape: Sequence[int], address: int) -> tuple[Any, ...]:
            return "cuda", gpu.ordinal, _ONNX[dtype.name], list(shape), address

        for name, array in given.host.items():
            io.bind_input(name, *where(array.dtype, array.shape, binding.packed.address + offsets[name]))
        for name, local in given.here.items():
            io.bind_input(name, *where(local.dtype, local.shape, local.buffer.address))
        for name, value in given.there.items():
            buffer = binding.copied[name] = gpu.memory.take(size_bytes(tuple(value.shape), self._dtypes[name]))
            io.bind_input(name, *where(self._dtypes[name], value.shape, buffer.address))
        if given.bounds is not None:
            bounds = binding.bounds = given.bounds  # which must live as long
            io.bind_input(BOUNDS, "cpu", 0, _ONNX[bounds.dtype.name], bounds.shape, bounds.ctypes.data)
        if caches is not None:
            slots, shapes = dict(caches), self._slot_shapes
        else:
            slots, shapes = self._discarded(sizes)
            binding.discarded += slots.values()
        for spec in self._specs:
            for past, present in zip(past_names(spec.name), present_names(spec.name), strict=True):
                at = where(self._cache_dtype, shapes[past], slots[past].address)
                io.bind_input(past, *at)
                io.bind_output(present, *at)
        for name in outputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in self._shapes[name])
            binding.shapes[name] = shape
            binding.outputs[name] = gpu.memory.take(size_bytes(shape, self._dtypes[name]))
            io.bind_output(name, *where(self._dtypes[name], shape, binding.outputs[name].address))
        return binding

    def _discarded(self, sizes: Mapping[str, int]) -> tuple[dict[str, Buffer], dict[str, tuple[int, ...]]]:
        """Caches for one step, and their shapes. One pair of buffers serves all layers of a shape, because each reads
        it right after writing it."""
        pairs: dict[tuple[int, ...], list[Buffer]] = {}
        buffers: dict[str, Buffer] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in self._specs:
            shape = self._cache_shape(spec, sizes[BATCH] * blocks(sizes[LENGTH]))
            if shape not in pairs:
                pairs[shape] = [self._device.zeroed(size_bytes(shape, self._cache_dtype)) for _ in range(2)]
            for name, buffer in zip(past_names(spec.name), pairs[shape], strict=True):
                buffers[name], shapes[name] = buffer, shape
        return buffers, shapes

    def _drop(self) -> None:
        """Drop all free bindings: what they are bound to changes."""
        while self._free:
            self._free.pop()[1].replay.close()

    def _cache_shape(self, spec: CacheSpec, count: int) -> tuple[int, ...]:
        return count, BLOCK, spec.heads, padded_size(spec)

    def _sizes(self, inputs: Mapping[str, Value]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name in self.input_names:
            known = zip(self._shapes[name], inputs[name].shape, strict=True)
            sizes.update((d, size) for d, size in known if isinstance(d, str))
        return sizes


def _session(stage: StageFile, device: CudaDevice, quantise: WeightDtype | None) -> tuple[Any, np.dtype[Any]]:
    """The session, and the type of its caches."""
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
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root_of(stage.folder)))
    lowered = lowered_for_cuda(stage, quantise)
    try:
        session = ort.InferenceSession(lowered.proto, options, providers=[(PROVIDER, cuda), "CPUExecutionProvider"])
    except Exception as error:  # the backend's exceptions have no common base
        raise EngineError(f"stage {stage.number} ({stage.file.name}) did not open: {first_line(error)}") from error
    if PROVIDER not in session.get_providers():
        why = why_not_started(device.gpu.ordinal)
        raise EngineError(f"ONNX Runtime could not start CUDA on {device.name}: {why}")
    return session, lowered.cache_dtype.numpy()


def _run_options() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options

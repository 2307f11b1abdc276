"""TensorRT on a GPU, either flavour: an engine file that was built for it, run in the stage's stream.

A binding is an execution context with its buffers, all bound once: the inputs, the outputs, and the rows of the caches
that the step uses. Outputs of the stage are the binding's own buffers. While anyone holds one of them, the binding is
not reused. So there is one for each micro-batch in flight, made while the pipeline warms up.

    new ──> leased ──the last output goes──> free ──the same shapes and slots──> leased: nothing to do
                                                  ──others──> leased: bound again, its graph dropped

In the steady state a run copies the inputs into place, replays the graph and records the event. Nothing is allocated,
and the host waits for nothing. All contexts of a stage run in one stream, one after the other, so they share one
scratch memory.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import BATCH
from stageline.runtime.devices.base import Array, Value
from stageline.runtime.devices.cuda.arrays import CudaArray, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.graphs import Replay
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.base import CacheSize, Device, StageFile, WeightDtype
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.tensorrt.guard import checked_engine
from stageline.runtime.engines.tensorrt.lower import Precision
from stageline.runtime.engines.tensorrt.records import EngineRecord, OptimizationProfile
from stageline.runtime.engines.tensorrt.refit import weights_of
from stageline.runtime.engines.tensorrt.targets import TargetGpu

_BINDINGS = 8  # of different shapes or slots that are kept; more if leased at the same time
_ALIGNED = 256  # bytes; addresses must be multiples
_PIECE_BYTES = 32 * 2**20  # of weights in pinned memory at a time


def open_tensorrt(
    stage: StageFile,
    device: Device,
    cache: CacheSize | None = None,
    quantise: WeightDtype | None = None,
    precision: Precision | None = None,
) -> "TensorRTEngine":
    """The stage's engine for this GPU, of `precision` (None: the last built), from its bundle. EngineError if none
    fits."""
    if not isinstance(device, CudaDevice):
        raise EngineError(f"the engine tensorrt runs on cuda:N, not on {device.name}; open with devices=['cuda:0']")
    if quantise is not None:
        raise EngineError(
            f"quantise={quantise!r} is for onnxruntime; a TensorRT engine has the precision that it was built in: "
            "stageline build --precision"
        )
    bundle = Bundle.open(stage.folder)
    if stage.file not in [bundle.path / one.file for one in bundle.manifest.stages]:
        raise EngineError(
            f"stage {stage.number} was recut while the pipeline ran, and TensorRT engines are for stages on disk; "
            "run stageline recut and stageline build, then open the bundle again"
        )
    driver, ordinal = device.gpu.driver, device.gpu.ordinal
    major, minor = driver.capability(ordinal)
    found = checked_engine(bundle, stage.number, TargetGpu(driver.name(ordinal), f"sm{major}{minor}"), precision)
    filled = weights_of(found.record, bundle.tensors)
    return TensorRTEngine(stage.number, device, found.flavour.load(), found.record, found.plan, cache, filled)


@dataclass(eq=False)
class _Binding:
    """An execution context and what it is bound to. `key`: the profile, the shapes and the address of the caches."""

    context: Any
    replay: Replay
    key: tuple[object, ...] = ()
    inputs: dict[str, Buffer] = field(default_factory=dict)
    outputs: dict[str, Buffer] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Lease:
    """Held by the outputs of a run; once the last of them is gone, the binding is free."""

    __slots__ = ("__weakref__",)


class TensorRTEngine:
    """One stage in TensorRT. Keeps the promises of `Engine`."""

    def __init__(
        self,
        number: int,
        device: CudaDevice,
        trt: Any,
        record: EngineRecord,
        plan: bytes,
        cache: CacheSize | None,
        weights: Iterable[tuple[str, Array]],
    ) -> None:
        """`trt`: the flavour's module; `plan`: the checked engine file; `weights`: those that are inputs of the engine.

        EngineError if TensorRT refuses the engine, the GPU has no memory, or it was built for less than `cache`.
        """
        self._number, self._device, self._record, self._trt = number, device, record, trt
        self.input_names = tuple(spec.name for spec in record.inputs)
        self.output_names = tuple(spec.name for spec in record.outputs)
        self._dtypes = {spec.name: _dtype(spec.dtype) for spec in (*record.inputs, *record.outputs, *record.weights)}
        self._cache_dtype = _dtype(record.cache_dtype)
        capacity = record.capacity or 0
        self._presents: dict[str, str] = {}
        self._cache_shapes: dict[str, tuple[int, int, int]] = {}  # per row: heads, tokens, size
        for spec in record.caches:
            pasts = past_names(spec.name)
            self._presents.update(zip(pasts, present_names(spec.name), strict=True))
            for name, size in zip(pasts, (spec.key_size, spec.value_size), strict=True):
                self._cache_shapes[name] = (spec.heads, capacity, size)
        self._row_bytes = {name: size_bytes(shape, self._cache_dtype) for name, shape in self._cache_shapes.items()}
        self.max_rows = max((p.sizes[BATCH].max for p in record.profiles if BATCH in p.sizes), default=1)
        slots = cache.slots if cache is not None else 0
        self._slot_shapes = {name: (slots, *shape) for name, shape in self._cache_shapes.items()}
        self._check(cache)
        self._bindings: list[_Binding] = []
        self._free: list[_Binding] = []  # those of them that are not leased, the last used at the end
        self._closed = False
        try:
            device.gpu.make_current()
            self._errors = _logger(trt)
            self._runtime = trt.Runtime(self._errors)
            # A version-compatible plan holds its runtime as host code. The guard has compared the plan's digest.
            self._runtime.engine_host_code_allowed = record.options.version_compatible
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise self._refused("does not open")
            if record.options.weight_streaming:
                self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
            self._config = self._runtime_config()
            self._scratch = device.gpu.memory.take(self._engine.device_memory_size_v2)
            self._weights = {
                spec.name: device.gpu.memory.take(size_bytes(_static(spec.shape), self._dtypes[spec.name]))
                for spec in record.weights
            }
            self._slots = self._allocated(cache.slots) if cache is not None else {}
            self._rows: dict[str, Buffer] = {}  # for `run`, allocated on its first call
        except CudaError as error:
            raise device.failed(error) from error
        self.load_weights(weights)

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        """See `Engine.run`."""
        if self._record.caches and not self._rows:
            try:
                self._device.gpu.make_current()
                self._rows = self._shared(self.max_rows)
            except CudaError as error:
                raise self._device.failed(error) from error
        return self._launched(inputs, outputs, {name: buffer.address for name, buffer in self._rows.items()})

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], first_slot: int) -> Mapping[str, Value]:
        """See `Engine.step`."""
        caches = {name: buffer.address + first_slot * self._row_bytes[name] for name, buffer in self._slots.items()}
        return self._launched(inputs, outputs, caches)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`. It runs in the stage's stream."""
        driver, stream = self._device.gpu.driver, self._device.stream
        try:
            self._device.gpu.make_current()
            for name, buffer in self._slots.items():
                heads, capacity, size = self._cache_shapes[name]
                token_bytes = size * self._cache_dtype.itemsize
                to, of = (buffer.address + slot * self._row_bytes[name] for slot in (target, source))
                driver.copy_rows(to, of, capacity * token_bytes, tokens * token_bytes, heads, stream)
        except CudaError as error:
            raise self._device.failed(error) from error

    def give_caches(self) -> Mapping[str, Value]:
        """See `Engine.give_caches`."""
        slots, self._slots = self._slots, {}
        return self._device.arrays(slots, self._slot_shapes, self._cache_dtype)

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        with Launch(self._device, f"stage {self._number}") as launch:
            self._slots = launch.adopt(caches, self._slot_shapes, self._cache_dtype)
            launch.end()

    def load_weights(self, weights: Iterable[tuple[str, Array]]) -> None:
        """Fill the inputs that hold a stripped engine's weights, after running work. They take effect with the next
        run. `weights` have the engine's names, shapes and types."""
        for name, array in weights:
            flat, buffer = array.reshape(-1), self._weights[name]
            piece = max(1, _PIECE_BYTES // array.itemsize)
            for start in range(0, len(flat), piece):
                with Launch(self._device, f"stage {self._number} weights") as launch:
                    launch.upload(flat[start : start + piece], buffer, start * array.itemsize)
                    launch.end().wait()  # keep pinned memory small

    def close(self) -> None:
        """Wait for running work, and free contexts, engine and caches. Outputs that are still held stay readable. May
        be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._device.gpu.make_current()
            self._device.gpu.driver.synchronize(self._device.stream)
            for binding in self._bindings:
                binding.replay.close()
        except (CudaError, EngineError):
            pass  # the GPU is lost, and whoever waited has got the error
        for binding in self._bindings:  # leased ones too: their outputs keep their own buffers
            binding.context = None
            binding.inputs, binding.outputs = {}, {}
        self._bindings.clear()
        self._free.clear()
        self._slots, self._rows, self._weights = {}, {}, {}
        del self._config, self._engine, self._runtime  # in this order, after the contexts

    # Running.

    def _launched(
        self, inputs: Mapping[str, Value], outputs: Sequence[str], caches: Mapping[str, int]
    ) -> Mapping[str, Value]:
        record, device = self._record, self._device
        shapes = {name: tuple(inputs[name].shape) for name in self.input_names}
        place, rows = self._profile(shapes)
        with Launch(device, f"stage {self._number} {record.profiles[place].name}") as launch:
            binding = self._bound(place, shapes, caches, rows)
            lease = _Lease()
            weakref.finalize(lease, self._free.append, binding).atexit = False
            for input_name, buffer in binding.inputs.items():
                launch.put(inputs[input_name], buffer, self._dtypes[input_name])
            for buffer in binding.outputs.values():
                launch.await_guards(buffer)
                launch.touch(buffer)
            launch.begin()
            binding.replay.run(binding.key, partial(self._execute, binding))
            done = launch.end()
        return {
            output: CudaArray(
                device, binding.outputs[output], binding.shapes[output], self._dtypes[output], done, lease
            )
            for output in outputs
        }

    def _execute(self, binding: _Binding) -> None:
        self._errors.last = ""
        if not binding.context.execute_async_v3(self._device.stream):
            raise self._refused("failed")

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """The index of the first profile that allows these shapes, and their rows."""
        sizes: dict[str, int] = {}
        for spec in self._record.inputs:
            free = zip(spec.shape, shapes[spec.name], strict=True)
            sizes.update((name, size) for name, size in free if isinstance(name, str))
        for place, profile in enumerate(self._record.profiles):
            if all(profile.sizes[name].min <= size <= profile.sizes[name].max for name, size in sizes.items()):
                return place, sizes.get(BATCH, 1)
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        built = "; ".join(f"{profile.name}: {_ranges(profile)}" for profile in self._record.profiles)
        raise EngineError(
            f"stage {self._number} was built for {built}, not for {shape}; send smaller batches, or build it for "
            "more: stageline build"
        )

    # Bindings.

    def _bound(
        self, place: int, shapes: Mapping[str, tuple[int, ...]], caches: Mapping[str, int], rows: int
    ) -> _Binding:
        """A free binding, bound to these shapes and caches."""
        key = (place, tuple(shapes.items()), next(iter(caches.values()), 0))
        for number, binding in enumerate(self._free):
            if binding.key == key:
                return self._free.pop(number)
        if len(self._free) >= _BINDINGS:
            binding = self._free.pop(0)  # the least recently used
        else:
            binding = _Binding(self._context(), Replay(self._device.gpu.driver, self._device.stream))
            self._bindings.append(binding)
        self._bind(binding, key, place, shapes, caches, rows)
        return binding

    def _bind(
        self,
        binding: _Binding,
        key: tuple[object, ...],
        place: int,
        shapes: Mapping[str, tuple[int, ...]],
        caches: Mapping[str, int],
        rows: int,
    ) -> None:
        context, stream = binding.context, self._device.stream
        self._errors.last = ""
        binding.key = ()  # until it is complete
        if context.active_optimization_profile != place and not context.set_optimization_profile_async(place, stream):
            raise self._refused(f"refused its profile {self._record.profiles[place].name}")
        for name, shape in shapes.items():
            self._set_shape(context, name, shape)
            binding.inputs[name] = self._grown(binding.inputs.get(name), size_bytes(shape, self._dtypes[name]))
            self._set_address(context, name, binding.inputs[name].address)
        for name, address in caches.items():
            self._set_shape(context, name, (rows, *self._cache_shapes[name]))
            self._set_address(context, name, address)
            self._set_address(context, self._presents[name], address)
        for name, buffer in self._weights.items():
            self._set_address(context, name, buffer.address)
        missing = context.infer_shapes()
        if missing:
            raise self._refused(f"does not know the shapes that follow from {', '.join(missing)}")
        for name in self.output_names:
            binding.shapes[name] = tuple(context.get_tensor_shape(name))
            size = size_bytes(binding.shapes[name], self._dtypes[name])
            binding.outputs[name] = self._grown(binding.outputs.get(name), size)
            self._set_address(context, name, binding.outputs[name].address)
        binding.key = key

    def _grown(self, buffer: Buffer | None, size: int) -> Buffer:
        return buffer if buffer is not None and buffer.size_bytes >= size else self._device.gpu.memory.take(size)

    def _context(self) -> Any:
        self._errors.last = ""
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self._refused("has no memory for another execution context")
        context.set_device_memory(self._scratch.address, self._engine.device_memory_size_v2)
        return context

    def _runtime_config(self) -> Any:
        """Contexts share the engine's scratch memory. With TensorRT-RTX, which compiles kernels for this GPU on their
        first use, they also share the compiled kernels."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache"):
            config.set_runtime_cache(config.create_runtime_cache())
        return config

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise self._refused(f"refused {name} of shape {list(shape)}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._refused(f"refused an address for {name}")

    # Caches.

    def _allocated(self, rows: int) -> dict[str, Buffer]:
        """Caches of `rows` rows, zero because what a mask hides is still multiplied by 0."""
        return {name: self._device.zeroed(rows * row_bytes) for name, row_bytes in self._row_bytes.items()}

    def _shared(self, rows: int) -> dict[str, Buffer]:
        """The same for rows that are discarded: one pair of buffers serves all layers of a size, because each reads it
        right after writing it."""
        pairs: dict[tuple[int, ...], list[Buffer]] = {}
        result: dict[str, Buffer] = {}
        for spec in self._record.caches:
            names = past_names(spec.name)
            sizes = tuple(rows * self._row_bytes[name] for name in names)
            if sizes not in pairs:
                pairs[sizes] = [self._device.zeroed(size) for size in sizes]
            result.update(zip(names, pairs[sizes], strict=True))
        return result

    def _check(self, cache: CacheSize | None) -> None:
        record = self._record
        if cache is None or not record.caches:
            return
        built = f"stage {self._number} was built for"
        if record.capacity is not None and cache.capacity > record.capacity:
            raise EngineError(
                f"{built} {record.capacity} tokens a slot, {cache.capacity} are requested; open with "
                f"capacity={record.capacity}, or build it for more"
            )
        if cache.slots > self.max_rows:
            raise EngineError(
                f"{built} {self.max_rows} slots, {cache.slots} are requested; open with slots={self.max_rows}, or "
                "build it for more"
            )
        if cache.dtype is not None and cache.dtype != record.cache_dtype:
            raise EngineError(f"{built} caches of {record.cache_dtype}, not {cache.dtype}; leave cache_dtype out")
        for name, row_bytes in self._row_bytes.items():
            if row_bytes % _ALIGNED and cache.slots > 1:
                raise EngineError(
                    f"{built} {record.capacity} tokens a slot, {row_bytes} bytes of {name}: slots must start at "
                    f"multiples of {_ALIGNED} bytes; build it for a capacity that is a multiple of {_ALIGNED // 2}"
                )

    def _refused(self, what: str) -> EngineError:
        why = f": {self._errors.last}" if self._errors.last else ""
        return EngineError(f"stage {self._number} {what} in TensorRT on {self._device.name}{why}")


def _logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's last error."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())

    return Errors()


def _dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a manifest's dtype name."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)  # type: ignore[no-any-return,unused-ignore]
    return np.dtype(name)


def _static(shape: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(size for size in shape if isinstance(size, int))


def _ranges(profile: OptimizationProfile) -> str:
    return " x ".join(f"{name} {sizes.min} to {sizes.max}" for name, sizes in profile.sizes.items())

"""TensorRT on a GPU, either flavour: an engine file that was built for it, run in the stage's stream.

In the steady state a run copies the inputs into the buffers of a binding (`bindings.py`), replays its graph and records
the event. Nothing is allocated, and the host waits for nothing. All contexts of a stage run in one stream, one after
the other, so they share one scratch memory.

A step's rows are rounded up to one of few counts, so that graphs are replayed while requests come and go. The rows that
are added have nothing new: their caches keep what they hold.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import BATCH
from stageline.runtime.devices.base import Array, Value
from stageline.runtime.devices.cuda.arrays import CudaArray, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.base import CacheSize, Device, PackedRows, StageFile, WeightDtype
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.tensorrt.bindings import Binding, Bindings, Key, Lease
from stageline.runtime.engines.tensorrt.guard import checked_engine
from stageline.runtime.engines.tensorrt.kernels import CompiledKernels
from stageline.runtime.engines.tensorrt.loading import Loaded
from stageline.runtime.engines.tensorrt.lower import Precision
from stageline.runtime.engines.tensorrt.records import EngineRecord, OptimizationProfile
from stageline.runtime.engines.tensorrt.refit import weights_of
from stageline.runtime.engines.tensorrt.targets import TargetGpu

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
    gpu = TargetGpu(driver.name(ordinal), f"sm{major}{minor}")
    found = checked_engine(bundle, stage.number, gpu, precision)
    filled = weights_of(found.record, bundle.tensors)
    kernels = CompiledKernels(bundle.path, found.record, str(gpu))
    trt = found.flavour.load()
    with found.opened() as plan:
        return TensorRTEngine(stage.number, device, trt, found.record, plan, kernels, cache, filled)


class TensorRTEngine:
    """One stage in TensorRT. Keeps the promises of `Engine`."""

    def __init__(
        self,
        number: int,
        device: CudaDevice,
        trt: Any,
        record: EngineRecord,
        plan: BinaryIO,
        kernels: CompiledKernels,
        cache: CacheSize | None,
        weights: Iterable[tuple[str, Array]],
    ) -> None:
        """`trt`: the flavour's module; `plan`: the checked engine file; `kernels`: where those compiled for it are
        kept; `weights`: those that are inputs of the engine.

        EngineError if TensorRT refuses the engine, the GPU has no memory, or it was built for less than `cache`.
        """
        self._number, self._device, self._record, self._kernels = number, device, record, kernels
        self.input_names = tuple(spec.name for spec in record.inputs)
        self.output_names = tuple(spec.name for spec in record.outputs)
        self._dtypes = {spec.name: _dtype(spec.dtype) for spec in (*record.inputs, *record.outputs, *record.weights)}
        self._cache_dtype = _dtype(record.cache_dtype)
        self._by_row = {spec.name for spec in (*record.inputs, *record.outputs) if spec.shape[:1] == (BATCH,)}
        capacity = record.capacity or 0
        presents: dict[str, str] = {}
        self._cache_shapes: dict[str, tuple[int, int, int]] = {}  # per row: heads, tokens, size
        for spec in record.caches:
            pasts = past_names(spec.name)
            presents.update(zip(pasts, present_names(spec.name), strict=True))
            for name, size in zip(pasts, (spec.key_size, spec.value_size), strict=True):
                self._cache_shapes[name] = (spec.heads, capacity, size)
        self._row_bytes = {name: size_bytes(shape, self._cache_dtype) for name, shape in self._cache_shapes.items()}
        self.packs, self.block_tokens = False, None
        self.max_rows = max((p.sizes[BATCH].max for p in record.profiles if BATCH in p.sizes), default=1)
        self._slot_count = cache.slots if cache is not None else 0
        self._slot_shapes = {name: (self._slot_count, *shape) for name, shape in self._cache_shapes.items()}
        self._check(cache)
        self._closed = False
        self._places: dict[int, tuple[tuple[str, int], ...]] = {}  # first slot -> where each cache begins
        try:
            device.gpu.make_current()
            self._loaded = Loaded(trt, record, plan, kernels.read(), f"stage {number}", device.name)
            self._weights = {
                spec.name: device.gpu.memory.take(size_bytes(_static(spec.shape), self._dtypes[spec.name]))
                for spec in record.weights
            }
            self._bindings = Bindings(
                device, self._loaded, self._dtypes, self.output_names, self._cache_shapes, presents, self._weights
            )
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
        caches = tuple((name, buffer.address) for name, buffer in self._rows.items())
        return self._launched(inputs, outputs, caches)

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> Mapping[str, Value]:
        """See `Engine.step`."""
        assert isinstance(rows, int)
        if rows not in self._places:
            self._places[rows] = tuple(
                (name, buffer.address + rows * self._row_bytes[name]) for name, buffer in self._slots.items()
            )
        return self._launched(inputs, outputs, self._places[rows], self._slot_count - rows)

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
        slots, self._slots, self._places = self._slots, {}, {}
        return self._device.arrays(slots, self._slot_shapes, self._cache_dtype)

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        with Launch(self._device, f"stage {self._number}") as launch:
            self._slots, self._places = launch.adopt(caches, self._slot_shapes, self._cache_dtype), {}
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

    @property
    def record(self) -> EngineRecord:
        """What was built."""
        return self._record

    def time_layers(self, report: Callable[[str, float], None]) -> None:
        """To be called before the first run: see `Loaded.time_layers`. No step is captured as a graph, whose layers
        TensorRT does not see."""
        self._loaded.time_layers(report)

    def close(self) -> None:
        """Wait for running work, and free contexts, engine and caches. Outputs that are still held stay readable. May
        be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._device.gpu.make_current()
            self._device.gpu.driver.synchronize(self._device.stream)
            self._bindings.close()
            compiled = self._loaded.kernels()
            if compiled is not None:
                self._kernels.keep(compiled)
        except (CudaError, EngineError):
            pass  # the GPU is lost, and whoever waited has got the error
        self._slots, self._rows, self._weights = {}, {}, {}
        self._loaded.close()

    # Running.

    def _launched(
        self,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        caches: tuple[tuple[str, int], ...],
        slots: int | None = None,
    ) -> Mapping[str, Value]:
        """`slots`: how many rows the caches have from these addresses on; None: as many as the inputs."""
        device = self._device
        shapes = {name: tuple(inputs[name].shape) for name in self.input_names}
        place, rows = self._profile(shapes)
        profile, count = self._record.profiles[place], rows
        if slots is not None:
            count = max(rows, min(rounded_rows(rows), slots, profile.sizes[BATCH].max if BATCH in profile.sizes else 1))
            shapes = {name: (count, *shape[1:]) if name in self._by_row else shape for name, shape in shapes.items()}
        host, here = {}, {}
        for name, shape in shapes.items():
            value = inputs[name]
            if isinstance(value, np.ndarray):
                host[name] = self._filled(value, shape, self._dtypes[name])
            elif isinstance(value, CudaArray) and self._readable(value, name, count):
                here[name] = value
        addresses = tuple((name, value.buffer.address) for name, value in here.items())
        key = Key(place, tuple(shapes.items()), tuple(host), addresses, caches, count)
        with Launch(device, f"stage {self._number} {profile.name}") as launch:
            binding = self._bindings.take(key, host)
            lease = self._bindings.lease(binding, count)
            launch.upload_all(host, binding.packed, binding.offsets)
            for value in here.values():
                launch.local(value, value.dtype)
            for name, buffer in binding.inputs.items():
                launch.put(inputs[name], buffer, self._dtypes[name])
            for buffer in binding.outputs.values():
                launch.await_guards(buffer)
                launch.touch(buffer)
            launch.begin()
            binding.replay.run(binding.key, partial(self._execute, binding), partial(self._capturable, binding))
            done = launch.end()
        results = {}
        for name in outputs:
            shape = binding.shapes[name]
            if name in self._by_row:
                shape = (rows, *shape[1:])  # the rows that were added are the last
            results[name] = CudaArray(device, binding.outputs[name], shape, self._dtypes[name], done, lease)
        return results

    @staticmethod
    def _filled(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of the host in `dtype`, with rows of zeros up to `shape`. In a buffer on the GPU, later rows keep
        values of an earlier step: nobody reads what is computed from them."""
        if array.shape == shape:
            return array.astype(dtype, copy=False)
        filled = np.zeros(shape, dtype)
        filled[: len(array)] = array
        return filled

    def _readable(self, value: CudaArray, name: str, count: int) -> bool:
        """Whether an input can be read where it is: on this GPU, in a binding of a TensorRT stage, whose addresses come
        again, and with all `count` rows."""
        there = value.device.gpu is self._device.gpu and value.dtype == self._dtypes[name]
        return there and isinstance(value.owner, Lease) and (name not in self._by_row or value.owner.rows >= count)

    def _execute(self, binding: Binding) -> None:
        self._loaded.forget_errors()
        if not binding.context.execute_async_v3(self._device.stream):
            raise self._loaded.refused("failed")

    def _capturable(self, binding: Binding) -> bool:
        """Whether TensorRT lets this binding's work be captured. Only TensorRT-RTX can tell before it is tried."""
        if self._loaded.times_layers:
            return False
        ask = getattr(binding.context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._device.stream))

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


def rounded_rows(rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... that is not less than `rows`: less than a
    quarter is added."""
    step = max(1 if rows <= 4 else 2, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // step) * step


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

"""ONNX Runtime on a GPU: a stage in a `CudaSession`, its caches as blocks, and its rows' places in them as inputs."""

from collections.abc import Mapping, Sequence
from functools import partial

from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, NEW_LENGTHS, PAST_LENGTHS, CacheSpec
from stageline.runtime.devices.base import Value, on_host
from stageline.runtime.devices.cuda.arrays import size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.devices.cuda.pools import Buffer
from stageline.runtime.engines.base import CacheSize, Device, PackedRows, StageFile, WeightDtype
from stageline.runtime.engines.cuda_session import CudaSession, State
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import root_of
from stageline.runtime.engines.lowering.flat_attention import padded_size
from stageline.runtime.engines.lowering.onnxruntime import lowered_for_cuda
from stageline.runtime.engines.lowering.paged import BLOCK, BOUNDS, PAGED_INPUTS, blocks, paged_inputs


class OnnxRuntimeCudaEngine:
    """One stage in an ONNX Runtime session on a GPU. Keeps the promises of `Engine`.

    It computes in the bundle's type. Attention with a cache is float16 where that type is float32: its operator has no
    other kernels.
    """

    max_rows = None
    packs, block_tokens = False, None

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
        lowered = lowered_for_cuda(stage, quantise)
        self._cache_dtype = lowered.cache_dtype.numpy()
        if cache is not None and cache.dtype not in (None, self._cache_dtype.name):
            raise EngineError(
                f"on a GPU this bundle's caches are {self._cache_dtype}, not {cache.dtype}; leave cache_dtype out"
            )
        try:
            device.gpu.make_current()
            name = f"stage {stage.number} ({stage.file.name})"
            self._session = CudaSession(device, name, lowered.proto, root_of(stage.folder))
            hidden = {n for spec in stage.caches for n in (*past_names(spec.name), *present_names(spec.name))}
            self.input_names = tuple(n for n in self._session.input_names if n not in hidden and n not in PAGED_INPUTS)
            self.output_names = tuple(n for n in self._session.output_names if n not in hidden)
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
        self._closed = False

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> Mapping[str, Value]:
        """See `Engine.run`."""
        if not self._specs:
            return self._session.run("run", inputs, outputs)
        sizes = self._session.sizes(inputs)
        discarded = partial(self._discarded, sizes[BATCH] * blocks(sizes[LENGTH]))
        return self._session.run("run", self._placed(inputs, 0, None), outputs, discarded, [BOUNDS])

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> Mapping[str, Value]:
        """See `Engine.step`."""
        assert isinstance(rows, int)
        given = self._placed(inputs, rows, self._capacity)
        return self._session.run("step", given, outputs, self._kept, [BOUNDS] if self._specs else [])

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
        self._session.drop()
        slots, self._slots = self._slots, {}
        return self._device.arrays(slots, self._slot_shapes, self._cache_dtype)

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        self._session.drop()
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
            self._session.close()
        except (CudaError, EngineError):
            pass  # the GPU is lost, and whoever waited has got the error
        self._slots = {}

    def _placed(self, inputs: Mapping[str, Value], first_slot: int, capacity: int | None) -> Mapping[str, Value]:
        """The inputs, and where in the caches their rows lie. `capacity`: of a slot; None: the length of the rows."""
        if not self._specs:
            return inputs
        past, new = (on_host(inputs, [name])[name] for name in (PAST_LENGTHS, NEW_LENGTHS))
        length = self._session.sizes(inputs)[LENGTH]
        return {**inputs, **paged_inputs(past, new, length, first_slot, capacity or length)}

    def _kept(self) -> list[State]:
        """The engine's own caches."""
        return self._states(self._slots, self._slot_shapes, kept=True)

    def _discarded(self, count: int) -> list[State]:
        """Caches of `count` blocks for one binding. One pair of buffers serves all layers of a shape, because each
        reads it right after writing it."""
        pairs: dict[tuple[int, ...], list[Buffer]] = {}
        buffers: dict[str, Buffer] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in self._specs:
            shape = self._cache_shape(spec, count)
            if shape not in pairs:
                pairs[shape] = [self._device.zeroed(size_bytes(shape, self._cache_dtype)) for _ in range(2)]
            for name, buffer in zip(past_names(spec.name), pairs[shape], strict=True):
                buffers[name], shapes[name] = buffer, shape
        return self._states(buffers, shapes, kept=False)

    def _states(self, buffers: Mapping[str, Buffer], shapes: Mapping[str, tuple[int, ...]], kept: bool) -> list[State]:
        return [
            State(past, present, self._cache_dtype, shapes[past], buffers[past], kept)
            for spec in self._specs
            for past, present in zip(past_names(spec.name), present_names(spec.name), strict=True)
        ]

    def _cache_shape(self, spec: CacheSpec, count: int) -> tuple[int, ...]:
        return count, BLOCK, spec.heads, padded_size(spec)

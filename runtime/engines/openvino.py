"""OpenVINO on a CPU: a stage as a compiled model, its caches as blocks of PagedAttention.

A step computes on packed tokens, of which none is padding: those of all rows of a micro-batch that have new ones, one
after the other. Slot n has the blocks from n * blocks a slot on.
"""

from collections.abc import Mapping, Sequence
from functools import cache as once
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, LOGITS_AT, NEW_LENGTHS, PAST_LENGTHS, CacheSpec
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import pin
from stageline.runtime.engines.base import Array, CacheSize, Device, StageFile, Value, WeightDtype
from stageline.runtime.engines.host_caches import Kinds, allocated, scratch, taken
from stageline.runtime.engines.lowering.cache_names import past_names
from stageline.runtime.engines.lowering.openvino import CONTROL, lowered_for_openvino

BLOCK = 32
"""Tokens of a block: OpenVINO's, on CPUs."""
_PICKS = "picks"  # the dimension of `logits_at`


class OpenVinoEngine:
    """One stage on the device's cores. Keeps the promises of `Engine`.

    It computes in float32.
    """

    max_rows = None

    def __init__(
        self,
        stage: StageFile,
        device: Device,
        cache: CacheSize | None = None,
        quantise: WeightDtype | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the stage; `properties` are further ones of the compiled model. EngineError if OpenVINO refuses it, or
        there is no memory for its caches."""
        self._number, self._specs = stage.number, stage.caches
        try:
            lowered = lowered_for_openvino(stage, quantise)
            if stage.caches:
                _pack(lowered.model, lowered.inputs)
            config = {**_config(device, cache), **(properties or {})}
            self._compiled = _core().compile_model(lowered.model, "CPU", config)
        except EngineError:
            raise
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(f"stage {stage.number} ({stage.file.name}) did not open: {_reason(error)}") from error
        finally:
            pin(device.cores)  # compiling resets it
        self._memory = lowered.memory
        self._inputs, self._outputs = lowered.inputs, lowered.outputs
        self.input_names, self.output_names = tuple(lowered.inputs), tuple(lowered.outputs)
        caches = {name for spec in stage.caches for name in past_names(spec.name)}
        self._ports = _by_name(self._compiled.inputs, {*lowered.inputs, *CONTROL, *caches})
        self._results = _by_name(self._compiled.outputs, {*lowered.outputs})
        self._cache_ports = {name: port for name, port in self._ports.items() if name in caches}
        self._request = self._compiled.create_infer_request()
        self._slot_blocks = -(-cache.capacity // BLOCK) if cache else 0
        self._kinds: Kinds = {}
        self._slots: dict[str, Array] = {}
        if cache:
            for spec in stage.caches:
                self._kinds |= self._kinds_of(spec, cache.slots * self._slot_blocks)
            self._slots = allocated(self._kinds, stage.number, cache.slots, cache.capacity)
            self._bind(self._slots)

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Engine.run`."""
        arrays = on_host(inputs, self.input_names)
        if not self._specs:
            found = self._infer(arrays, self._outputs)
            return {name: found[name] for name in outputs}
        blocks = -(-self._length(arrays) // BLOCK)
        count = len(arrays[NEW_LENGTHS]) * blocks
        buffers = scratch(self._kinds_of(spec, count) for spec in self._specs)  # they must live while they are bound
        self._bind(buffers)
        try:
            return self._run_packed(arrays, outputs, 0, blocks)
        finally:
            self._bind(self._slots)

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], first_slot: int) -> dict[str, Array]:
        """See `Engine.step`."""
        return self._run_packed(on_host(inputs, self.input_names), outputs, first_slot, self._slot_blocks)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`. It copies whole blocks."""
        used = -(-tokens // BLOCK)
        to, of = (slot * self._slot_blocks for slot in (target, source))
        for array in self._slots.values():
            array[to : to + used] = array[of : of + used]

    def give_caches(self) -> dict[str, Array]:
        """See `Engine.give_caches`."""
        given, self._slots = self._slots, {}
        return given

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        self._slots = taken(caches, self._kinds, self._number)
        self._bind(self._slots)

    def counters(self) -> list[Any]:
        """The `ProfilingInfo` of each layer in the last run, of a model compiled with PERF_COUNT."""
        return list(self._request.profiling_info)

    def runtime_model(self) -> ov.Model:
        """The graph that runs, after OpenVINO's own transformations."""
        return self._compiled.get_runtime_model()

    def close(self) -> None:
        """See `Engine.close`."""
        self._request = self._compiled = None
        self._slots = {}

    # Running.

    def _run_packed(
        self, arrays: Mapping[str, Array], outputs: Sequence[str], first_slot: int, blocks: int
    ) -> dict[str, Array]:
        """Run on the tokens of the rows alone, and give the results their places in the batch. Padding is 0."""
        past, new = arrays[PAST_LENGTHS], arrays[NEW_LENGTHS]
        length = self._length(arrays)
        rows = np.flatnonzero(new)
        count, held = new[rows].astype(np.int32), past[rows].astype(np.int32)
        begins = _begins(count)
        place = np.arange(begins[-1]) - np.repeat(begins[:-1], count)  # of each token in its row
        at = np.repeat(rows * length, count) + place  # and in the batch
        values = {
            name: _packed(arrays[name], dims.index(LENGTH), at) for name, dims in self._inputs.items() if LENGTH in dims
        }
        values |= {PAST_LENGTHS: np.repeat(past[rows], count) + place, NEW_LENGTHS: np.ones(len(at), np.int64)}
        sizes: dict[str, tuple[int, int]] = {LENGTH: (len(new), length)}
        places = {LENGTH: at}
        if LOGITS_AT in self._inputs:
            picks = np.minimum(arrays[LOGITS_AT][rows], count[:, None] - 1)  # padding is not read
            values[LOGITS_AT] = (begins[:-1, None] + picks).reshape(-1, 1).astype(np.int64)
            sizes[_PICKS] = len(new), picks.shape[1]
            places[_PICKS] = (rows[:, None] * picks.shape[1] + np.arange(picks.shape[1])).reshape(-1)
        values |= _control(held, count, (first_slot + rows) * blocks)
        axes: dict[str, tuple[int, str]] = {}
        wanted: dict[str, list[int | str]] = {}
        for name, dims in self._outputs.items():
            kind = next((dim for dim in sizes if dim in dims), None)
            if kind is None:
                raise EngineError(f"stage {self._number}: {name!r} of {list(dims)} is not of single tokens")
            axes[name] = dims.index(kind), kind
            packed = {BATCH: len(places[kind]), kind: 1}
            wanted[name] = [packed.get(size, size) if isinstance(size, str) else size for size in dims]
        found = self._infer(values, wanted)
        return {
            name: _spread(found[name], axis, places[kind], sizes[kind])
            for name, (axis, kind) in axes.items()
            if name in outputs
        }

    def _length(self, arrays: Mapping[str, Array]) -> int:
        """The padded length of the rows."""
        name, dims = next((name, dims) for name, dims in self._inputs.items() if LENGTH in dims)
        return int(arrays[name].shape[dims.index(LENGTH)])

    def _infer(self, values: Mapping[str, Array], wanted: Mapping[str, Sequence[int | str]]) -> dict[str, Array]:
        """`wanted`: all outputs, by the sizes that are known beforehand. None may stay bound to an array of an earlier
        run, which belongs to the caller."""
        kept: list[Array] = []  # what the request reads in place
        made: dict[str, Array] = {}
        try:
            for name, port in self._ports.items():
                if name not in self._cache_ports:
                    kept.append(np.asarray(values[name], order="C"))
                    self._request.set_tensor(port, ov.Tensor(kept[-1], shared_memory=kept[-1].ndim > 0))
            for name, shape in wanted.items():
                known = [size for size in shape if isinstance(size, int)]
                if len(known) == len(shape):
                    made[name] = np.empty(known, self._results[name].get_element_type().to_dtype())
                    self._request.set_tensor(self._results[name], ov.Tensor(made[name], shared_memory=True))
            self._request.infer()
            for name in wanted.keys() - made.keys():
                made[name] = np.array(self._request.get_tensor(self._results[name]).data)
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(f"stage {self._number} failed in OpenVINO: {_reason(error)}") from error
        return made

    # Caches.

    def _kinds_of(self, spec: CacheSpec, blocks: int) -> Kinds:
        """Keys and values of a cache, in the shape and type of a block that the compiled model chose."""
        ports = {name: self._cache_ports[name] for name in past_names(spec.name)}
        return {n: ((blocks, *_block_shape(port)), port.get_element_type().to_dtype()) for n, port in ports.items()}

    def _bind(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            self._request.set_tensor(self._cache_ports[name], ov.Tensor(array, shared_memory=True))


@once
def _core() -> Any:
    return ov.Core()


def _config(device: Device, cache: CacheSize | None) -> dict[str, Any]:
    dtype = (cache and cache.dtype) or "float32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": len(device.cores),
        "ENABLE_CPU_PINNING": False,  # the stage's worker, which computes, is bound to its cores
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": {"float32": "f32", "float16": "f16"}[dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations stay what they are
    }


def _pack(model: ov.Model, inputs: Mapping[str, tuple[int | str, ...]]) -> None:
    """Let the model take packed tokens: rows of length 1."""
    known = _by_name(model.inputs, {*inputs})
    ones = {LENGTH: 1, _PICKS: 1}
    shapes = {name: [size if isinstance(size, int) else ones.get(size, -1) for size in inputs[name]] for name in known}
    model.reshape({port: ov.PartialShape(shapes[name]) for name, port in known.items()})


def _by_name(ports: Sequence[Any], names: set[str]) -> dict[str, Any]:
    """Ports by the one of their names that is wanted: a tensor has the names of all its copies."""
    return {name: port for port in ports for name in port.get_names() & names}


def _block_shape(port: Any) -> tuple[int, ...]:
    return tuple(size.get_length() for size in list(port.get_partial_shape())[1:])


def _begins(counts: NDArray[np.int32]) -> NDArray[np.int32]:
    begins = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    return begins


def _control(held: NDArray[np.int32], count: NDArray[np.int32], first: NDArray[Any]) -> dict[str, Array]:
    """The inputs of `CONTROL`, for rows with blocks that follow each other from `first` on."""
    after = held + count
    used = -(-after // BLOCK)
    block_begins = _begins(used)
    blocks = np.arange(block_begins[-1], dtype=np.int32) + np.repeat(first.astype(np.int32) - block_begins[:-1], used)
    most = np.array(after.max(initial=0), np.int32)
    return dict(zip(CONTROL, (held, _begins(count), blocks, block_begins, most), strict=True))


def _packed(array: Array, axis: int, at: NDArray[Any]) -> Array:
    """[rows, ..., length, ...] -> [tokens, ..., 1, ...]: those at places `at` of the batch."""
    tokens = np.moveaxis(array, axis, 1)
    return np.expand_dims(tokens.reshape(-1, *tokens.shape[2:])[at], axis)


def _spread(found: Array, axis: int, at: NDArray[Any], sizes: tuple[int, int]) -> Array:
    """[tokens, ..., 1, ...] -> [rows, ..., length, ...], of zeros where no token is; `sizes`: rows and length."""
    tokens = found.squeeze(axis)
    if len(at) < sizes[0] * sizes[1]:
        tokens = np.zeros((sizes[0] * sizes[1], *tokens.shape[1:]), found.dtype)
        tokens[at] = found.squeeze(axis)
    return np.moveaxis(tokens.reshape(*sizes, *tokens.shape[1:]), 1, axis)


def _reason(error: Exception) -> str:
    """The last line of an error's message: OpenVINO begins with where in its sources it arose."""
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()

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
from stageline.runtime.bundle.manifest import LENGTH, LOGITS_AT, PICKS, CacheSpec
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import pin
from stageline.runtime.engines.base import Array, CacheSize, Device, PackedRows, StageFile, Value, WeightDtype
from stageline.runtime.engines.host_caches import Kinds, allocated, scratch, taken
from stageline.runtime.engines.lowering.cache_names import past_names
from stageline.runtime.engines.lowering.openvino import CONTROL, lowered_for_openvino
from stageline.runtime.engines.packing import packed, token_shape

BLOCK = 32
"""Tokens of a block: OpenVINO's, on CPUs."""


class OpenVinoEngine:
    """One stage on the device's cores. Keeps the promises of `Engine`.

    It computes in float32.
    """

    max_rows = None
    packs, block_tokens = True, BLOCK

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
                self._kinds |= self._kinds_of(spec, cache.blocks(BLOCK))
            self._slots = allocated(self._kinds, stage.number, cache.rows, cache.capacity)
            self._bind(self._slots)

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Engine.run`."""
        arrays = on_host(inputs, self.input_names)
        if not self._specs:
            found = self._infer(arrays, self._outputs)
            return {name: found[name] for name in outputs}
        batch = packed(arrays, self._inputs, 0)
        blocks = -(-batch.length // BLOCK)
        buffers = scratch(self._kinds_of(spec, batch.batch * blocks) for spec in self._specs)
        self._bind(buffers)  # which must live while they are bound
        try:
            return batch.unpacked(self._run_tokens(batch.values, outputs, batch.rows, blocks), self._outputs)
        finally:
            self._bind(self._slots)

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        """See `Engine.step`."""
        if not self._specs:
            return self.run(inputs, outputs)
        arrays = on_host(inputs, self.input_names)
        if not isinstance(rows, int):
            return self._run_tokens(arrays, outputs, rows, self._slot_blocks)
        batch = packed(arrays, self._inputs, rows)
        return batch.unpacked(self._run_tokens(batch.values, outputs, batch.rows, self._slot_blocks), self._outputs)

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

    def _run_tokens(
        self, values: Mapping[str, Array], outputs: Sequence[str], rows: PackedRows, blocks: int
    ) -> dict[str, Array]:
        """Run on packed tokens; see `_control`."""
        tokens, picks = int(rows.counts.sum()), len(values.get(LOGITS_AT, ()))
        wanted = {name: token_shape(dims, tokens, picks) for name, dims in self._outputs.items()}
        found = self._infer({**values, **_control(rows, blocks)}, wanted)
        return {name: found[name] for name in outputs}

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
    ones = {LENGTH: 1, PICKS: 1}
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


def _control(rows: PackedRows, blocks: int) -> dict[str, Array]:
    """The inputs of `CONTROL`. A slot has `blocks` blocks to itself, unless the rows say where they lie."""
    past, counts = rows.past.astype(np.int32), rows.counts.astype(np.int32)
    after = past + counts
    used = -(-after // BLOCK)
    block_begins, table = _begins(used), rows.blocks
    if table is None:
        first = (rows.slots * blocks).astype(np.int32)
        table = np.arange(block_begins[-1], dtype=np.int32) + np.repeat(first - block_begins[:-1], used)
    most = np.array(after.max(initial=0), np.int32)
    return dict(zip(CONTROL, (past, _begins(counts), table, block_begins, most), strict=True))


def _reason(error: Exception) -> str:
    """The last line of an error's message: OpenVINO begins with where in its sources it arose."""
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()

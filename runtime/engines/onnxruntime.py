"""ONNX Runtime on a CPU.

Inputs and outputs are NumPy arrays: `InferenceSession.run` reads contiguous arrays in place and hands over its own
output buffers. Measured on an identity graph (ONNX Runtime 1.32): 3 us a run, against 5 us through IOBinding and
30 us through `run_with_ort_values`. Caches need IOBinding: only it can bind past and present to one buffer.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import BATCH, LENGTH, LOGITS_AT, PAST_LENGTHS, CacheSpec
from stageline.runtime.devices.base import on_host
from stageline.runtime.engines.base import Array, CacheSize, Device, PackedRows, StageFile, Value, WeightDtype
from stageline.runtime.engines.host_caches import Kinds, allocated, scratch, taken
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import root_of
from stageline.runtime.engines.lowering.flat_attention import padded_size
from stageline.runtime.engines.lowering.group_query import row_inputs
from stageline.runtime.engines.lowering.onnxruntime import first_line, lowered
from stageline.runtime.engines.lowering.session_weights import give_weights
from stageline.runtime.engines.packing import packed, token_shape

_BINDINGS = 64  # row ranges whose caches stay bound


class OnnxRuntimeEngine:
    """One stage in an ONNX Runtime session on the device's cores. Keeps the promises of `Engine`.

    The thread that runs the session is one of the session's threads; the others are pinned to a core each.
    """

    max_rows = block_tokens = None

    def __init__(
        self,
        stage: StageFile,
        device: Device,
        cache: CacheSize | None = None,
        quantise: WeightDtype | None = None,
        options: ort.SessionOptions | None = None,
    ) -> None:
        """Open the stage, with `options` in place of `session_options`. EngineError if ONNX Runtime refuses it, or
        there is no memory for its caches."""
        self._number = stage.number
        dtype, grouped = np.dtype((cache and cache.dtype) or "float32"), _takes_ragged_rows()
        if dtype != np.float32 and not grouped:
            raise EngineError(f"ONNX Runtime {ort.__version__} has no {dtype} caches on CPUs; leave cache_dtype out")
        try:
            graph = lowered(stage, ir.DataType.from_numpy(dtype), quantise, grouped)
            options = options or session_options(stage, device.cores)
            self._weights = give_weights(options, graph.weights)
            self._session = ort.InferenceSession(graph.proto, options, providers=["CPUExecutionProvider"])
        except EngineError:
            raise
        except Exception as error:  # the backend's exceptions have no common base
            raise EngineError(f"stage {stage.number} ({stage.file.name}) did not open: {first_line(error)}") from error
        self._inputs, self._outputs = graph.inputs, graph.outputs
        self.input_names, self.output_names = tuple(graph.inputs), tuple(graph.outputs)
        self._dtypes = {value.name: _NUMPY.get(value.type, np.float32) for value in self._session.get_outputs()}
        self.packs = grouped
        self._specs, self._cache_dtype = stage.caches, dtype
        self._kinds: Kinds = {}
        self._slots: dict[str, Array] = {}
        if cache:
            for spec in stage.caches:
                self._kinds |= self._kinds_of(spec, cache.rows, cache.capacity + (cache.chunk if grouped else 0))
            self._slots = allocated(self._kinds, stage.number, cache.rows, cache.capacity)
        self._bindings: OrderedDict[tuple[int, int, tuple[str, ...]], Any] = OrderedDict()

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Engine.run`."""
        arrays = on_host(inputs, self.input_names)
        if self._specs:
            rows, length = self._rows_and_length(arrays)
            buffers = scratch(self._kinds_of(spec, rows, length) for spec in self._specs)
            return self._batch(arrays, outputs, 0, buffers)
        try:
            values = self._session.run(outputs, arrays)
        except Exception as error:
            raise self._failed(error) from error
        return dict(zip(outputs, values, strict=True))

    def step(self, inputs: Mapping[str, Value], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        """See `Engine.step`."""
        if not self._specs:
            return self.run(inputs, outputs)
        arrays = on_host(inputs, self.input_names)
        if isinstance(rows, int):
            return self._batch(arrays, outputs, rows, None)
        return self._tokens(arrays, outputs, rows, None)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See `Engine.copy_slot`."""
        for buffer in self._slots.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def give_caches(self) -> dict[str, Array]:
        """See `Engine.give_caches`."""
        self._bindings.clear()
        given, self._slots = self._slots, {}
        return given

    def take_caches(self, caches: Mapping[str, Value]) -> None:
        """See `Engine.take_caches`."""
        slots = taken(caches, self._kinds, self._number)
        self._bindings.clear()
        self._slots = slots

    def end_profiling(self) -> Path:
        """Write what a session opened with `enable_profiling` has timed so far, and return the file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session, its threads and the caches."""
        self._bindings.clear()
        self._slots = {}
        self._session, self._weights = None, []

    def _kinds_of(self, spec: CacheSpec, rows: int, tokens: int) -> Kinds:
        """Keys and values of a cache. GroupQueryAttention takes one size for both.

        It also wants room behind each row for the widest one of a step, which it never writes to: memory that is not
        written is not taken.
        """
        sizes = [padded_size(spec)] * 2 if self.packs else [spec.key_size, spec.value_size]
        names = past_names(spec.name)
        return {n: ((rows, spec.heads, tokens, s), self._cache_dtype) for n, s in zip(names, sizes, strict=True)}

    def _batch(
        self, arrays: Mapping[str, Array], outputs: Sequence[str], first: int, buffers: Mapping[str, Array] | None
    ) -> dict[str, Array]:
        """Run on rows of the slots from `first` on, or of `buffers`."""
        if self.packs:
            batch = packed(arrays, self._inputs, first)
            return batch.unpacked(self._tokens(batch.values, outputs, batch.rows, buffers), self._outputs)
        count = len(arrays[PAST_LENGTHS])
        sizes: dict[str, int] = {}
        for name, dims in self._inputs.items():
            sizes.update((d, n) for d, n in zip(dims, arrays[name].shape, strict=True) if isinstance(d, str))
        shapes = {name: [sizes[d] if isinstance(d, str) else d for d in self._outputs[name]] for name in outputs}
        return self._bound(self._binding(first, count, tuple(outputs), buffers), arrays, shapes)

    def _tokens(
        self, arrays: Mapping[str, Array], outputs: Sequence[str], rows: PackedRows, buffers: Mapping[str, Array] | None
    ) -> dict[str, Array]:
        """Run on packed tokens of rows of the slots, or of `buffers`."""
        further, first, count = row_inputs(rows)
        tokens, picks = int(rows.counts.sum()), len(arrays.get(LOGITS_AT, ()))
        shapes = {name: token_shape(self._outputs[name], tokens, picks) for name in outputs}
        return self._bound(self._binding(first, count, tuple(outputs), buffers), {**arrays, **further}, shapes)

    def _binding(self, first: int, count: int, outputs: tuple[str, ...], buffers: Mapping[str, Array] | None) -> Any:
        """A binding in which each cache's past and present are one buffer: of slots, or rows of `buffers`. One for
        other outputs is another, since what was bound before stays bound."""
        key = first, count, outputs
        if buffers is None and key in self._bindings:
            self._bindings.move_to_end(key)
            return self._bindings[key]
        binding = self._session.io_binding()
        for spec in self._specs:
            for past, present in zip(past_names(spec.name), present_names(spec.name), strict=True):
                buffer = (self._slots if buffers is None else buffers)[past][first : first + count]
                where = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
                binding.bind_input(past, *where)
                binding.bind_output(present, *where)
        if buffers is None:
            self._bindings[key] = binding
            if len(self._bindings) > _BINDINGS:
                self._bindings.popitem(last=False)
        return binding

    def _bound(
        self, binding: Any, inputs: Mapping[str, Array], shapes: Mapping[str, Sequence[int | str]]
    ) -> dict[str, Array]:
        """Run with the inputs; the outputs have these shapes."""
        try:
            kept = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            for name, array in kept.items():
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            results: dict[str, Array] = {}
            for name, shape in shapes.items():
                array = results[name] = np.empty(shape, self._dtypes[name])  # type: ignore[arg-type]
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise self._failed(error) from error
        return results

    def _rows_and_length(self, inputs: Mapping[str, Array]) -> tuple[int, int]:
        found: dict[Any, int] = {}
        for name in self.input_names:
            found.update(zip(self._inputs[name], inputs[name].shape, strict=True))
        return found[BATCH], found[LENGTH]

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(f"stage {self._number} failed in ONNX Runtime: {first_line(error)}")


@cache
def _takes_ragged_rows() -> bool:
    """Whether GroupQueryAttention takes rows padded on the right: since ONNX Runtime 1.32, in its 17th input."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return any(schema.name == "GroupQueryAttention" and schema.max_input >= 17 for schema in get_all_operator_schema())


_NUMPY = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(double)": np.float64}


def session_options(stage: StageFile, cores: tuple[int, ...]) -> ort.SessionOptions:
    """How a session opens a stage on these cores."""
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = len(cores)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: errors are raised, and nothing else belongs on a server's stderr
    # The session's threads on their own cores may spin between operators, which makes a decode step a third faster. At
    # the end of a run they stop, to leave the cores to the next stage.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root_of(stage.folder)))
    if len(cores) > 1:  # one entry for each thread except the calling one; ONNX Runtime counts cores from 1
        affinities = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    return options

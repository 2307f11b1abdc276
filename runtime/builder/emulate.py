"""A lowered stage on a CPU, each value rounded to its type: what an engine computes, as far as types determine it.

ONNX Runtime has no bfloat16 kernels for CPUs. So every operator computes in float32, and each value that is float16 or
bfloat16 in the graph is rounded to that and back. An engine fuses operators and rounds less often.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from stageline.models.errors import EngineError
from stageline.runtime.bundle.manifest import CacheSpec
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.float32 import HALVES, to_float32
from stageline.runtime.engines.lowering.session_weights import give_weights, take_weights
from stageline.runtime.engines.tensorrt.lower import Lowered


class EmulatedStage:
    """A lowered stage with its weights, open in ONNX Runtime. `caches` are float32 arrays that `run` updates."""

    def __init__(self, lowered: Lowered, rows: int, capacity: int, values: Sequence[str] = ()) -> None:
        """`rows` of empty caches of `capacity` tokens. `values` names values inside the graph that `run` also
        returns."""
        model = ir.from_proto(onnx.ModelProto.FromString(lowered.proto))
        for name, weight in lowered.weights.items():
            model.graph.initializers[name].const_value = ir.tensor(weight.read(), dtype=weight.dtype, name=name)
        round_halves(model, values)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # Otherwise products of quantised weights are fused into operators that also quantise activations.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        weights = take_weights(model)
        proto = ir.to_proto(model).SerializeToString()
        self._weights = give_weights(options, weights)
        self._session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.output_names = tuple(spec.name for spec in lowered.outputs) + tuple(values)
        self.caches = {
            name: np.zeros(shape, np.float32)
            for cache in lowered.caches
            for name, shape in zip(past_names(cache.name), _shapes(cache, rows, capacity), strict=True)
        }
        self._presents = {
            past: present
            for cache in lowered.caches
            for past, present in zip(past_names(cache.name), present_names(cache.name), strict=True)
        }

    def run(self, inputs: Mapping[str, Array], first_row: int = 0) -> dict[str, Array]:
        """The outputs for these inputs, with the caches from row `first_row` on, which grow by the new tokens."""
        wanted = [value.name for value in self._session.get_inputs() if value.name not in self.caches]
        given = {name: inputs[name] for name in wanted}
        rows = len(next(iter(given.values())))
        held = {name: array[first_row : first_row + rows] for name, array in self.caches.items()}
        names = [*self.output_names, *self._presents.values()]
        results = dict(zip(names, self._session.run(names, {**given, **held}), strict=True))
        for past, present in self._presents.items():
            self.caches[past][first_row : first_row + rows] = results.pop(present)
        return results


def _shapes(cache: CacheSpec, rows: int, capacity: int) -> list[tuple[int, int, int, int]]:
    return [(rows, cache.heads, capacity, size) for size in (cache.key_size, cache.value_size)]


def round_halves(model: ir.Model, values: Sequence[str]) -> None:
    """Let every operator compute in float32, and round values that are float16 or bfloat16."""
    graph = model.graph
    halves = [(node, value, value.dtype) for node in graph for value in node.outputs if value.dtype in HALVES]
    to_float32(model)
    for node, value, dtype in halves:
        assert dtype is not None
        down = ir.node("Cast", [value], {"to": dtype})
        up = ir.node("Cast", down.outputs, {"to": ir.DataType.FLOAT})
        rounded = up.outputs[0]
        rounded.name, value.name = value.name, f"{value.name}.exact"
        rounded.shape, rounded.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
        down.replace_input_with(0, value)
        graph.insert_after(node, [down, up])
    names = {value.name: value for node in graph for value in node.outputs}
    for name in values:
        if name not in names:
            raise EngineError(f"the lowered stage has no value {name!r}")
        graph.outputs.append(names[name])

"""Quantise the weights of a lowered graph's matrix products: TensorRT multiplies by what DequantizeLinear gives.

Weights only: they are what decoding reads. Activations stay float16, for a scale of their own that is fixed ahead does
not fit them: in SmolLM2 the first tokens carry values of 24,000.
"""

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.runtime.engines.lowering.nbits import multiplied_weight
from stageline.runtime.engines.lowering.weights import QuantisedWeight, Scales, Weight, unread

Quantisation = Literal["int8", "fp8", "int4"]
_TYPES: dict[Quantisation, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
}
_INT4_GROUP = 64  # values of a scale; TensorRT knows 64 and 128


def to_quantised(model: ir.Model, kind: Quantisation) -> dict[str, Weight]:
    """Let each matrix product of `model` whose matrix is a weight read it quantised, in place.

    int8 and fp8 have a scale for each output channel, int4 for each 64 values of one (a matrix that these do not divide
    stays as it is). Returns, by the name of its initializer, what each new one is to hold.
    """
    made: dict[ir.Value, ir.Value] = {}
    weights: dict[str, Weight] = {}
    for node in list(model.graph):
        found = multiplied_weight(node)
        if found is None:
            continue
        value, transposed = found
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        axis = 1 if transposed else 0  # along which the products are summed
        columns = int(tensor.shape.numpy()[axis])
        group = _INT4_GROUP if kind == "int4" else columns
        if columns % group:
            continue
        if value not in made:
            quantised = QuantisedWeight(tensor, _TYPES[kind], axis, group)
            assert value.dtype is not None
            pair = {
                f"{value.name}.{kind}": quantised,
                f"{value.name}.{kind}.scales": Scales(tensor, value.dtype, quantised),
            }
            weights.update(pair)
            made[value] = _dequantised(model.graph, value, pair, quantised)
        _reread(node, value, made[value])
    RemoveUnusedNodesPass()(model)
    return weights


def _dequantised(graph: ir.Graph, value: ir.Value, pair: dict[str, Weight], weight: QuantisedWeight) -> ir.Value:
    """What stands for `value`: its quantised self, times its scales."""
    inputs = []
    for name, part in pair.items():
        tensor = unread(name, part)
        new = ir.Value(name=name, shape=ir.Shape(part.shape), type=ir.TensorType(part.dtype), const_value=tensor)
        graph.register_initializer(new)
        inputs.append(new)
    blocks = {"axis": weight.axis, "block_size": weight.group}
    channels = {"axis": 1 - weight.axis}
    whole = weight.group == weight.shape[weight.axis]
    node = ir.node("DequantizeLinear", inputs, channels if whole else blocks, name=f"{value.name}.dequantised")
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{value.name}.dequantised", value.shape, value.type
    graph.insert_before(graph[0], node)
    return result


def _reread(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the matrix of a product come from `new` where it came from `old`, by way of casts and transposes."""
    place = 1
    while node.inputs[place] is not old:
        value = node.inputs[place]
        assert value is not None
        producer = value.producer()
        if producer is None:  # another product has done it
            return
        node, place = producer, 0
    node.replace_input_with(place, new)

"""Quantise the weights of a lowered graph's matrix products: TensorRT fuses DequantizeLinear into the product.

Only weights, because they dominate the memory that decoding reads. Activations stay halves: no fixed scale fits them.
In SmolLM2 the first tokens have values of 24,000.
"""

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.runtime.engines.lowering.external import Stored
from stageline.runtime.engines.lowering.nbits import multiplied_weight
from stageline.runtime.engines.lowering.weights import QuantisedWeight, Scales, Weight, unread

Quantisation = Literal["int8", "fp8", "int4"]
_TYPES: dict[Quantisation, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
}
INT4_GROUP = 64  # values per scale; TensorRT supports 64 and 128


def to_quantised(model: ir.Model, kind: Quantisation, scales: ir.DataType) -> dict[str, Weight]:
    """Let each matrix product of `model` read its weight quantised, in place.

    int8 and fp8 have one scale per output channel, int4 one per 64 values of a channel (a matrix whose size is not a
    multiple of 64 is not quantised). Scales are rounded to the type `scales`, float16 or bfloat16. Returns the contents
    of each new initializer by its name.
    """
    made: dict[ir.Value, ir.Value] = {}
    weights: dict[str, Weight] = {}
    for node in list(model.graph):
        found = multiplied_weight(node)
        if found is None:
            continue
        value, transposed = found
        tensor = value.const_value
        if not isinstance(tensor, Stored):
            continue
        axis = 1 if transposed else 0  # that the products are summed over
        columns = int(tensor.shape.numpy()[axis])
        group = INT4_GROUP if kind == "int4" else columns
        if columns % group:
            continue
        if value not in made:
            quantised = QuantisedWeight(tensor, _TYPES[kind], axis, group, scales)
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
    """The replacement of `value`: its quantised values times their scales."""
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
    """Let a product that reads `old`, through casts and transposes, read `new` instead."""
    place = 1
    while node.inputs[place] is not old:
        value = node.inputs[place]
        assert value is not None
        producer = value.producer()
        if producer is None:  # another product has been here
            return
        node, place = producer, 0
    node.replace_input_with(place, new)

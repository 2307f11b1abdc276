"""Lower a half-precision graph to float32, for engines with few half-precision kernels.

The weights on disk do not change: each half-precision initializer is cast to float32 where it enters the graph, and the
engine folds that cast when it loads. Everything after it is float32, inputs and outputs included. The results differ
only by being more exact.
"""

from collections.abc import Collection

import onnx_ir as ir

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type"})


def has_types(model: ir.Model, types: Collection[ir.DataType] = HALVES) -> bool:
    """True if a value, initializer or attribute of the model has one of `types` (float16 and bfloat16)."""
    return any(
        value.dtype in types
        for graph in model.graphs()
        for values in (graph.inputs, graph.initializers.values(), *(node.outputs for node in graph))
        for value in values
    ) or any(_names(attribute, types) for node in model.graph.all_nodes() for attribute in node.attributes.values())


def to_float32(model: ir.Model) -> ir.Model:
    """Lower `model` in place and return it. Only initializers stay half-precision, each followed by a Cast."""
    in_functions = [node for function in model.functions.values() for node in function.all_nodes()]
    for node in [*model.graph.all_nodes(), *in_functions]:
        for attribute in list(node.attributes.values()):
            if _names(attribute, HALVES):
                node.attributes[attribute.name] = _widened(attribute)
        for value in node.outputs:
            _widen(value)
    for graph in list(model.graphs()):
        for value in graph.inputs:
            _widen(value)
        casts = [_cast(value) for value in list(graph.initializers.values()) if value.dtype in HALVES]
        if len(graph):
            graph.insert_before(graph[0], casts)
        else:
            graph.extend(casts)
    return model


def _widen(value: ir.Value) -> None:
    if value.dtype in HALVES:
        value.dtype = ir.DataType.FLOAT


def _cast(initializer: ir.Value) -> ir.Node:
    """A Cast of the initializer, which takes over its name and its uses."""
    name = initializer.name
    initializer.name = f"{name}.half"
    wide = ir.Value(name=name, shape=initializer.shape, type=ir.TensorType(ir.DataType.FLOAT))
    initializer.replace_all_uses_with(wide, replace_graph_outputs=True)
    return ir.node("Cast", [initializer], {"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{name}.widen")


def _names(attribute: ir.Attr, types: Collection[ir.DataType]) -> bool:
    """True if the attribute is a tensor of one of `types`, or names one."""
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().dtype in types
    is_dtype = attribute.type == ir.AttributeType.INT and attribute.name in _DTYPE_ATTRIBUTES
    return is_dtype and attribute.as_int() in types


def _widened(attribute: ir.Attr) -> ir.Attr:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return ir.AttrTensor(attribute.name, ir.tensor(tensor.numpy().astype("float32"), name=tensor.name))
    return ir.AttrInt64(attribute.name, ir.DataType.FLOAT)

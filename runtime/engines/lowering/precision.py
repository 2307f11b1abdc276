"""Set the type of every value of a float32 graph, for engines that compute each operator in the types of its inputs.

Values computed from weights and the hidden state get the requested precision. Values computed only from integers and
constants (positions, rotary tables, masks) stay float32 until they meet the others: in bfloat16, position 257 would be
position 256. Sums, squares and their roots leave the range of float16, so they are computed in float32 as well, and so
is what chooses experts (TopK), from the product on: a rounded router takes others. So are the nodes that a bundle
names, with their weights (stageline verify --find-precision). Inputs and outputs stay float32, except the caches. Casts
down are clipped to finite values: a mask's -3e38 must not become -inf.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from stageline.models.errors import EngineError
from stageline.runtime.engines.lowering.external import Stored
from stageline.runtime.engines.lowering.float32 import HALVES

_WIDE = frozenset(
    {"Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log", "CumSum"}
)
_FLOATS = frozenset({ir.DataType.FLOAT, *HALVES})
_FLOAT_PARAMETERS = {"Resize": frozenset({1, 2})}
"""Operator -> its inputs that must stay float32."""
INSTEAD_OF = "stageline.instead_of"
"""In a node's `meta`: the name of the node of the bundle's graph that it computes a part of."""


def widen_initializers(model: ir.Model) -> None:
    """Let each floating initializer enter the graph as float32: a Cast of one becomes the initializer itself, and
    constants are converted. A weight's value has the type in the graph, its tensor the one on disk."""
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or not source.is_initializer() or node.op_type != "Cast":
            continue
        if {source.dtype, _to(node)} <= _FLOATS:
            ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if _is_weight(value):
            value.dtype = ir.DataType.FLOAT
        elif tensor.dtype in HALVES:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
            value.dtype = ir.DataType.FLOAT


def read_as_stored(model: ir.Model) -> None:
    """Let a weight whose tensor has another type than its value enter the graph as it is stored, followed by a Cast."""
    casts = []
    for value in list(model.graph.initializers.values()):
        tensor, dtype = value.const_value, value.dtype
        if not _is_weight(value) or tensor is None or dtype is None or tensor.dtype == dtype:
            continue
        del model.graph.initializers[str(value.name)]
        stored = ir.Value(
            name=f"{value.name}.stored", shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": dtype}, name=f"{value.name}.cast")
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, cast.outputs[0], replace_graph_outputs=True)
        cast.outputs[0].name = value.name
        casts.append(cast)
    for cast in casts:
        model.graph.insert_before(model.graph[0], cast)


def to_precision(model: ir.Model, dtype: ir.DataType, state: Collection[str], wide: Collection[str] = ()) -> None:
    """Type the values of `model`, a float32 graph whose weights have no casts, in place. `state` names the inputs and
    outputs that are caches, `wide` the nodes that compute in float32. EngineError if the graph has branches or loops,
    or a value whose type cannot be inferred."""
    _infer_types(model)
    typing = _Typing(model.graph, dtype, wide)
    for value in model.graph.inputs:
        if value.name in state:
            value.dtype = dtype
            typing.narrow.add(value)
    for node in list(model.graph):
        typing.visit(node)
    for place, value in enumerate(model.graph.outputs):
        if value in typing.narrow and value.name not in state:
            model.graph.outputs[place] = typing.widened_output(value)
    RemoveUnusedNodesPass()(model)
    typing.rename_weights()


def _infer_types(model: ir.Model) -> None:
    """Give every value of the graph its type. ONNX's inference leaves the whole model as it is if the tensor of one
    initializer has another type than its value, so it sees the weights in the type that they have in the graph."""
    weights = {value: value.const_value for value in model.graph.initializers.values() if _is_weight(value)}
    for value in weights:
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor("weights", 0, None, value.dtype, shape=value.shape, name=str(value.name))
    try:
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    finally:
        for value, tensor in weights.items():
            value.const_value = tensor
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and (value.uses() or value.is_graph_output()):
                raise EngineError(
                    f"the type of {value.name!r}, which {node.op_type} computes, cannot be inferred: "
                    "choose --precision fp32, and report this"
                )


def _choosing(graph: ir.Graph) -> set[ir.Node]:
    """What leads to a TopK, back to the products that make its scores, these included."""
    found: set[ir.Node] = set()
    left = [node for node in graph if node.op_type == "TopK"]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        if node.op_type not in ("MatMul", "Gemm"):
            left += [producer for value in node.inputs if value is not None and (producer := value.producer())]
    return found


def of_weights(node: ir.Node) -> bool:
    """Whether the node computes from initializers only, such as the transpose of a weight."""
    producers = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
    return bool(node.inputs) and all(producer is not None and of_weights(producer) for producer in producers)


def _with_weights(graph: ir.Graph, names: Collection[str]) -> set[ir.Node]:
    """The nodes of these names, and what prepares weights for them."""
    found: set[ir.Node] = set()
    left = [node for node in graph if node.meta.get(INSTEAD_OF, node.name) in names]
    while left:
        node = left.pop()
        found.add(node)
        producers = [value.producer() for value in node.inputs if value is not None]
        left += [producer for producer in producers if producer is not None and of_weights(producer)]
    return found


class _Typing:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, wide: Collection[str]) -> None:
        self.graph, self.dtype, self.wide = graph, dtype, _with_weights(graph, wide)
        self.narrow: set[ir.Value] = set()
        self.choosing = _choosing(graph)
        self.cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.limit = float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]

    def visit(self, node: ir.Node) -> None:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise EngineError(f"operator {node.op_type} ({node.name}) has a subgraph: only float32 can be built")
        kept = _FLOAT_PARAMETERS.get(node.op_type, frozenset())
        places = [
            place
            for place, value in enumerate(node.inputs)
            if (value is not None and value.dtype == ir.DataType.FLOAT and place not in kept) or value in self.narrow
        ]
        values = [value for place in places if (value := node.inputs[place]) is not None]
        squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        to_wide = node.op_type in _WIDE or squares or node in self.wide or node in self.choosing
        is_narrow = not to_wide and any(value in self.narrow or _is_weight(value) for value in values)
        for place, value in zip(places, values, strict=True):
            node.replace_input_with(place, self.narrowed(value, node) if is_narrow else self.widened(value, node))
        if node.op_type == "Cast" and _to(node) == ir.DataType.FLOAT and is_narrow:
            node.attributes["to"] = ir.AttrInt64("to", self.dtype)
        if is_narrow:
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    value.dtype = self.dtype
                    self.narrow.add(value)

    def narrowed(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value in self.narrow:
            return value
        key = (value, self.dtype)
        if key not in self.cast:
            self.cast[key] = self.retyped(value) if value.is_initializer() else self.clipped(value, before)
        return self.cast[key]

    def widened(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self.narrow:
            return value
        key = (value, ir.DataType.FLOAT)
        if key not in self.cast:
            self.cast[key] = self.inserted("Cast", [value], before, f"{value.name}.float32", ir.DataType.FLOAT)
        return self.cast[key]

    def retyped(self, value: ir.Value) -> ir.Value:
        """A weight or constant in the narrow type. A weight keeps its tensor on disk."""
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{self.dtype.name.lower()}"
        if not _is_weight(value):
            array = np.clip(tensor.numpy(), -self.limit, self.limit).astype(self.dtype.numpy())
            tensor = ir.tensor(array, dtype=self.dtype, name=name)
        new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype), const_value=tensor)
        self.graph.register_initializer(new)
        self.narrow.add(new)
        return new

    def clipped(self, value: ir.Value, before: ir.Node) -> ir.Value:
        # These names are part of the digests of engines.
        ends = [self.scalar(f"precision.{sign}", end) for sign, end in (("least", -self.limit), ("most", self.limit))]
        inside = self.inserted("Clip", [value, *ends], before, f"{value.name}.finite", ir.DataType.FLOAT)
        narrow = self.inserted("Cast", [inside], before, f"{value.name}.{self.dtype.name.lower()}", self.dtype)
        self.narrow.add(narrow)
        return narrow

    def inserted(self, op: str, inputs: list[ir.Value], before: ir.Node, name: str, dtype: ir.DataType) -> ir.Value:
        node = ir.node(op, inputs, {"to": dtype} if op == "Cast" else None, name=name)
        result = node.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(dtype), inputs[0].shape
        self.graph.insert_before(before, node)
        return result

    def scalar(self, name: str, number: float) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.float32(number), name=name)
            self.graph.register_initializer(
                ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
            )
        return self.graph.initializers[name]

    def widened_output(self, value: ir.Value) -> ir.Value:
        """The graph's output `value` in float32, under its name."""
        name = value.name
        value.name = f"{name}.{self.dtype.name.lower()}"
        node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}.float32")
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(node)
        return node.outputs[0]

    def rename_weights(self) -> None:
        """Restore the names of weights that are read in the narrow type only."""
        suffix = f".{self.dtype.name.lower()}"
        for value in list(self.graph.initializers.values()):
            name = str(value.name)
            if _is_weight(value) and name.endswith(suffix) and name.removesuffix(suffix) not in self.graph.initializers:
                del self.graph.initializers[name]
                value.name = name.removesuffix(suffix)
                self.graph.register_initializer(value)


def _to(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes["to"].as_int())


def _is_weight(value: ir.Value) -> bool:
    """Whether the value is an initializer of floating type in a file."""
    tensor = value.const_value
    return value.is_initializer() and isinstance(tensor, Stored) and tensor.dtype.is_floating_point()

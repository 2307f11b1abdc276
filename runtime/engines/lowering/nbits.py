"""Lower the matrix products of a stage to ONNX Runtime's MatMulNBits: weights of 4 or 8 bits, a checkpoint's own or
quantised on opening.

Weights of other widths are stored in the next one. Activations are quantised to 8 bits inside the operator (accuracy
level 4), as in llama.cpp.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.models.errors import EngineError
from stageline.models.tensors import PackedEntry
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.engines.lowering.external import Stored, read_stored
from stageline.runtime.engines.lowering.nbits_operands import BLOCK, Operands, operand_bytes, operands
from stageline.runtime.engines.lowering.packed import Packed
from stageline.runtime.engines.lowering.packed_rows import table_bytes
from stageline.runtime.engines.lowering.rounding import rounded

MIN_WEIGHTS = 1 << 14  # smaller matrices are not quantised on opening
MAX_GRAPH_BYTES = 1_900_000_000  # of one graph: protobuf ends at 2 GiB
_BITS = {"int4": 4, "int8": 8}
_PACKED_BYTES: dict[Hashable, tuple[int, int]] = {}


def to_nbits(model: ir.Model, dtype: WeightDtype | None) -> ir.Model:
    """Lower `model`, whose activations are float32, in place and return it: the products of packed weights, and with
    `dtype` those of others. EngineError if its weights do not fit into one graph."""
    lowering = _Lowering(model.graph, dtype)
    for node in list(model.graph):
        found = multiplied_weight(node)
        if found is not None:
            lowering.visit(node, *found)
    model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    return model


def bytes_per_weight(dtype: WeightDtype) -> float:
    """Bytes of a quantised weight, including its share of its block's scale and zero point, and of what is left of its
    offset."""
    if dtype == "float32":
        return 4.0
    columns = BLOCK * BLOCK
    return quantised_bytes(1, columns, dtype) / columns


def quantised_bytes(rows: int, columns: int, dtype: WeightDtype) -> int:
    """Bytes of a matrix that is quantised on opening."""
    found = operand_bytes(rows, columns, _BITS[dtype], BLOCK, whole=columns % BLOCK > 0)
    assert found is not None
    return found


def packed_bytes(entry: PackedEntry) -> tuple[int, int]:
    """Bytes of a packed weight where it is multiplied by, and where its rows are looked up. Reads it, unless one of
    this kind and shape was read before."""
    packing = entry.packing
    key = (packing.method, tuple(sorted(packing.settings.items())), packing.shape)
    if key not in _PACKED_BYTES:
        groups = Packed.of(entry).groups() if len(packing.shape) == 2 else None
        wide = 4 * math.prod(packing.shape)
        product, table = wide, wide
        if groups is not None:
            rows, columns = packing.shape
            product = operand_bytes(rows, columns, groups.bits, groups.group, groups.zeros is not None) or wide
            table = table_bytes(groups) or wide
        _PACKED_BYTES[key] = product, table
    return _PACKED_BYTES[key]


def check_graph_size(model: ir.Model, what: str) -> None:
    """EngineError if what would lie in the graph itself is more than one may hold."""
    inside = (
        v.const_value for v in model.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)
    )
    if sum(tensor.nbytes for tensor in inside if tensor is not None) > MAX_GRAPH_BYTES:
        raise EngineError(
            f"the {what} weights of one stage have more than {MAX_GRAPH_BYTES / 1e9} GB; cut the bundle into more "
            "stages: stageline recut BUNDLE --stages N"
        )


def multiplied_weight(node: ir.Node, min_weights: int = 1) -> tuple[ir.Value, bool] | None:
    """The initializer of at least `min_weights` elements that the node multiplies its first input by, and whether its
    layout is [N, K]."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[0] is None or node.inputs[1] is None:
        return None
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    if any(name in node.attributes and node.attributes[name].value != value for name, value in plain.items()):
        return None
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    value = node.inputs[1]
    while (producer := value.producer()) is not None and producer.op_type in ("Transpose", "Cast"):
        if producer.op_type == "Transpose":
            transposed = not transposed
        source = producer.inputs[0]
        assert source is not None
        value = source
    if not value.is_initializer() or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return (value, transposed) if value.const_value.size >= min_weights else None


class _Lowering:
    """Replaces products by MatMulNBits. What several of them read is made once: a weight's operands, and activations
    in another order or with the sums of their blocks."""

    def __init__(self, graph: ir.Graph, dtype: WeightDtype | None) -> None:
        self.graph, self.dtype = graph, dtype
        self.operands: dict[tuple[ir.Value, bool], tuple[Operands, list[ir.Value]] | None] = {}
        self.made: dict[Hashable, ir.Value] = {}

    def visit(self, node: ir.Node, weight: ir.Value, transposed: bool) -> None:
        """Replace the product, if it is one of a packed weight or of one to be quantised."""
        if (weight, transposed) not in self.operands:
            found = self.operands_of(weight, transposed)
            named = (
                []
                if found is None
                else [self.initializer(f"{weight.name}.nbits.{i}", array) for i, array in enumerate(found.arrays)]
            )
            self.operands[weight, transposed] = None if found is None else (found, named)
        held = self.operands[weight, transposed]
        if held is not None:
            self.replace(node, *held)

    def operands_of(self, weight: ir.Value, transposed: bool) -> Operands | None:
        tensor = weight.const_value
        assert tensor is not None
        if isinstance(tensor, Packed):
            groups = tensor.groups() if transposed else None
            return None if groups is None else operands(groups)
        if self.dtype is None or tensor.size < MIN_WEIGHTS:
            return None
        array = read_stored(tensor) if isinstance(tensor, Stored) else np.asarray(tensor.numpy())
        array = array.astype(np.float32)
        return operands(rounded(array if transposed else array.T, _BITS[self.dtype], BLOCK))

    def replace(self, node: ir.Node, weight: Operands, named: list[ir.Value]) -> None:
        given = node.inputs[0]
        assert given is not None
        if weight.order is not None:
            given = self.ordered(node, given, weight.order)
        if weight.levels:
            given = self.with_sums(node, given, weight)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        product = ir.node(
            "MatMulNBits",
            [given, *named, None, bias],
            {
                "K": weight.width, "N": len(weight.values), "bits": weight.bits, "block_size": weight.block,
                "accuracy_level": 4,
            },
            domain="com.microsoft",
            name=f"{node.name}.nbits",
        )  # fmt: skip
        self.graph.insert_before(node, product)
        result, old = product.outputs[0], node.outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def ordered(self, node: ir.Node, given: ir.Value, order: NDArray[np.int64]) -> ir.Value:
        """The columns of the activations in another order."""
        key = given, "order", order.tobytes()
        if key not in self.made:
            places = self.initializer(f"{node.name}.order", order)
            self.made[key] = self.added(node, "Gather", [given, places], axis=-1)
        return self.made[key]

    def with_sums(self, node: ir.Node, given: ir.Value, weight: Operands) -> ir.Value:
        """The activations [..., K], and after them the sum of each block, as often as there are levels."""
        key = given, weight.block, weight.levels
        if key not in self.made:
            grouped = self.added(node, "Reshape", [given, self.block_shape(node, given, weight)])
            last = self.initializer(f"{node.name}.last", np.array([-1], np.int64))
            sums = self.added(node, "ReduceSum", [grouped, last], keepdims=0)
            spaced = sums
            if weight.levels > 1 and weight.padding:
                pads = self.initializer(f"{node.name}.pads", np.array([0, weight.padding], np.int64))
                spaced = self.added(node, "Pad", [sums, pads, None, last])
            parts = [given, *[spaced] * (weight.levels - 1), sums]
            self.made[key] = self.added(node, "Concat", parts, axis=-1)
        return self.made[key]

    def block_shape(self, node: ir.Node, given: ir.Value, weight: Operands) -> ir.Value:
        """[..., blocks, block], of activations whose rank the graph may not say."""
        rank = 2 if node.op_type == "Gemm" else len(given.shape or node.outputs[0].shape or ())
        name, blocks = f"{node.name}.blocks", [weight.sums, weight.block]
        if rank:
            return self.initializer(name, np.array([0] * (rank - 1) + blocks, np.int64))
        before = self.added(node, "Shape", [given], end=-1)
        return self.added(node, "Concat", [before, self.initializer(name, np.array(blocks, np.int64))], axis=0)

    def added(self, node: ir.Node, operator: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        """The output of a new operator before the node."""
        new = ir.node(operator, inputs, attributes, name=f"{node.name}.{operator.lower()}.{len(self.graph)}")
        value = new.outputs[0]
        value.name = f"{new.name}.out"
        self.graph.insert_before(node, new)
        return value

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        data = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

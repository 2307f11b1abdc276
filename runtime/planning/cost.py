"""What each use of a part costs for a shape, from its ONNX graph alone: operations, bytes, parameters, cache.

A multiply and an add count as two operations. Free dimensions get the sizes of the shape. Shapes missing in the graph
are inferred for elementwise operators, Transpose and MatMul. Constants, views and the preparation of weights
(Transpose, Cast) cost nothing: engines do them when they open. Operators inside If, Loop and Scan count once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from stageline.models.tensors import Entry, PackedEntry
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.graph import ir_dtype
from stageline.runtime.bundle.manifest import Manifest, TensorSpec
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.engines.lowering.nbits import MIN_WEIGHTS, packed_bytes, quantised_bytes
from stageline.runtime.workload import Shape

_FREE_SIZE = 64  # of a dimension that is neither batch, length nor picks, as in bundle.graph.size_bytes
_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size", "Constant", "Range"})
_OF_WEIGHTS = frozenset({"Transpose", "Cast", *_VIEWS})  # done once, when an engine opens
_Dims = tuple[int, ...]


@dataclass(frozen=True)
class UseCost:
    """What a use costs for one micro-batch. `flops` are those of matrix products, convolutions and attention,
    `elementwise` the elements that all other operators write. `weight_read_bytes` counts only the rows that are looked
    up in a table; `activation_bytes` are read and written by operators, as if none were fused.
    """

    flops: int
    elementwise: int
    weight_read_bytes: int
    activation_bytes: int
    cache_read_bytes: int
    parameters: int
    parameter_bytes: int
    cache_token_bytes: int  # that one token of one row adds to the cache


def use_costs(
    manifest: Manifest,
    tensors: Mapping[str, Entry],
    parts: Sequence[ir.Model],
    shape: Shape,
    cache_itemsize: int = 4,
    quantise: WeightDtype | None = None,
    itemsize: float = 4.0,
) -> list[UseCost]:
    """The cost of each use in order: prologue, blocks, epilogue. A cache holds elements of `cache_itemsize` bytes.

    Weights count as ONNX Runtime on CPUs holds them with this `quantise`: quantised matrices, the rest in float32; with
    "float32", or without packed weights and `quantise`, as `itemsize` bytes each, whatever the files hold.
    """
    graphs = [_Graph(part, [w.name for w in manifest.parts[n].weights], shape) for n, part in enumerate(parts)]
    costs = []
    for use in manifest.uses:
        graph, caches = graphs[use.part], manifest.parts[use.part].caches
        held = {local: graph.held(local, tensors[name], quantise, itemsize) for local, name in use.weights.items()}
        # By the tensor's name, so that one that is used twice counts once.
        held_bytes = {name: held[local] * math.prod(tensors[name].shape) for local, name in use.weights.items()}
        token_bytes = cache_itemsize * sum(cache.heads * (cache.key_size + cache.value_size) for cache in caches)
        costs.append(
            UseCost(
                graph.flops,
                graph.elementwise,
                round(sum(held[name] * count for name, count in graph.weight_reads.items())),
                graph.activation_bytes,
                token_bytes * shape.batch * (shape.past + shape.length),
                sum(math.prod(tensors[name].shape) for name in held_bytes),
                round(sum(held_bytes.values())),
                token_bytes,
            )
        )
    return costs


class _Graph:
    """A walk over a part's nodes, with sizes for free dimensions."""

    def __init__(self, model: ir.Model, weights: Sequence[str], shape: Shape):
        self.shape, self.sizes = shape, shape.sizes()
        self.dims: dict[ir.Value, _Dims | None] = {}
        self.weight_of: dict[ir.Value, str] = {v: str(v.name) for v in model.graph.inputs if v.name in set(weights)}
        self.weight_reads: dict[str, int] = {}  # elements
        self.matrices: dict[str, int] = {}  # weights that are multiplied by, and how many rows of a product's operand
        self.tables: set[str] = set()  # weights whose rows are looked up
        self.flops = self.elementwise = self.activation_bytes = 0
        for node in model.graph.all_nodes():
            self._visit(node)

    def of(self, value: ir.Value | None) -> _Dims | None:
        """The value's sizes, None if unknown."""
        if value is None:
            return None
        if value not in self.dims:
            self.dims[value] = self._declared(value)
        return self.dims[value]

    def _declared(self, value: ir.Value) -> _Dims | None:
        if value.shape is None:
            return None
        named = {d.value for d in value.shape if isinstance(d, ir.SymbolicDim) and d.value and d.value.isidentifier()}
        known = value.shape.evaluate({**dict.fromkeys(named, _FREE_SIZE), **self.sizes})
        return tuple(d if isinstance(d, int) else _FREE_SIZE for d in known)

    def elements(self, value: ir.Value | None) -> int:
        """The value's number of elements, 0 if unknown."""
        dims = self.of(value)
        return 0 if dims is None else math.prod(dims)

    def bytes_of(self, value: ir.Value) -> int:
        """The value's size in bytes, 0 if unknown."""
        return round(self.elements(value) * (value.dtype.itemsize if value.dtype is not None else 4))

    def _visit(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        first = inputs[0] if inputs else None
        for output in node.outputs:
            if self.of(output) is None:
                self.dims[output] = _inferred(node, [self.of(value) for value in node.inputs])
        if first in self.weight_of and node.op_type in _OF_WEIGHTS:
            assert first is not None
            self.weight_of[node.outputs[0]] = self.weight_of[first]
            return
        if node.op_type in _VIEWS:
            return
        rule = _PRODUCTS.get(node.op_type)
        if rule is None:
            self.elementwise += sum(self.elements(value) for value in node.outputs)
        else:
            self.flops += rule(self, node)
        for value in inputs:
            if value in self.weight_of:
                looked_up = node.op_type.startswith("Gather") and value is first
                count = self.elements(node.outputs[0]) if looked_up else self.elements(value)
                self.weight_reads[self.weight_of[value]] = count
                if looked_up:
                    self.tables.add(self.weight_of[value])
                if node.op_type in ("MatMul", "Gemm") and value is node.inputs[1] and len(self.of(value) or ()) == 2:
                    self.matrices[self.weight_of[value]] = self._summed(node, value)
            elif value.const_value is None:
                self.activation_bytes += self.bytes_of(value)
        self.activation_bytes += sum(self.bytes_of(value) for value in node.outputs)

    def _summed(self, node: ir.Node, weight: ir.Value) -> int:
        """The size of the matrix that the product is summed over."""
        turned = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return (self.of(weight) or (0, 0))[1 if turned else 0]

    def held(self, local: str, tensor: Entry, quantise: WeightDtype | None, itemsize: float) -> float:
        """Bytes that an engine holds of each value of the weight."""
        size, columns = math.prod(tensor.shape), self.matrices.get(local)
        if isinstance(tensor, PackedEntry) and quantise != "float32":
            product, table = packed_bytes(tensor)
            if columns is not None and columns == tensor.shape[-1]:
                return product / size
            if local in self.tables:
                return table / size
        elif columns is not None and quantise not in (None, "float32") and size >= MIN_WEIGHTS:
            return quantised_bytes(size // columns, columns, quantise) / size
        return itemsize


def _inferred(node: ir.Node, inputs: Sequence[_Dims | None]) -> _Dims | None:
    """Sizes of a node's output, if they follow from its inputs."""
    known = [dims for dims in inputs if dims is not None]
    if not known or len(known) < len(inputs):
        return None
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(known[0]))[::-1]
        return tuple(known[0][axis] for axis in perm)
    if node.op_type == "MatMul" and min(map(len, known)) > 1:
        return (*np.broadcast_shapes(known[0][:-2], known[1][:-2]), known[0][-2], known[1][-1])
    if node.op_type in _SAME_SIZE:
        try:
            return np.broadcast_shapes(*known)
        except ValueError:
            return None
    return None


_SAME_SIZE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sigmoid", "Tanh", "Erf", "Relu", "Gelu", "Neg", "Sqrt", "Reciprocal", "Exp",
     "Softmax", "Cast", "Where", "And", "Or", "Not", "Identity", "Cos", "Sin", "Max", "Min", "Clip", "Silu", "Swish"}
)  # fmt: skip


def _matmul(graph: _Graph, node: ir.Node) -> int:
    left = graph.of(node.inputs[0])
    return 2 * graph.elements(node.outputs[0]) * (left[-1] if left else 0)


def _gemm(graph: _Graph, node: ir.Node) -> int:
    left = graph.of(node.inputs[0])
    turned = "transA" in node.attributes and node.attributes["transA"].as_int()
    return 2 * graph.elements(node.outputs[0]) * (left[0 if turned else -1] if left else 0)


def _conv(graph: _Graph, node: ir.Node) -> int:
    kernel = graph.of(node.inputs[1])  # [output channels, input channels of a group, *window]
    return 2 * graph.elements(node.outputs[0]) * (math.prod(kernel[1:]) if kernel else 0)


def _attention(graph: _Graph, node: ir.Node) -> int:
    """Operations for the scores of every query with every key, and for the sums of values, in dense kernels."""
    query, key, value = (graph.of(source) for source in node.inputs[:3])
    if query is None or key is None or value is None:
        return 0
    if len(query) == 3:  # [batch, length, heads x size]
        heads, shared = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
        return 2 * query[0] * heads * query[1] * key[1] * (query[2] // heads + value[2] // shared)
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def _cache_attention(graph: _Graph, node: ir.Node) -> int:
    """Operations of attention from each new token to itself and the tokens before it, within the window."""
    query, value = graph.of(node.inputs[0]), graph.of(node.inputs[2])
    if query is None or value is None:
        return 0
    seen = graph.shape.past + np.arange(1, query[2] + 1)
    if "window" in node.attributes and node.attributes["window"].as_int() > 0:
        seen = np.minimum(seen, node.attributes["window"].as_int())
    return 2 * query[0] * query[1] * int(seen.sum()) * (query[3] + value[3])


_PRODUCTS: Mapping[str, Callable[[_Graph, ir.Node], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
    "CacheAttention": _cache_attention,
}


def cut_values(manifest: Manifest, parts: Sequence[ir.Model]) -> list[tuple[TensorSpec, ...]]:
    """For each block, what a stage that starts with it receives: hidden state, shared values, inputs of the model."""
    found: list[tuple[TensorSpec, ...]] = [()]
    for first in range(1, manifest.blocks):
        crossing = Crossing.of(manifest, parts, [first, manifest.blocks - first])
        found.append(tuple(crossing.specs[name] for name in crossing.inputs[1]))
    return found


def values_bytes(values: Sequence[TensorSpec], shape: Shape) -> int:
    """Bytes of these values for a micro-batch."""
    sizes = shape.sizes()
    return sum(
        math.prod(d if isinstance(d, int) else sizes.get(d, _FREE_SIZE) for d in spec.shape)
        * int(ir_dtype(spec.dtype).itemsize)
        for spec in values
    )

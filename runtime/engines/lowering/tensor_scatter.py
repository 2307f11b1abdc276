"""Lower cache attention to ONNX's TensorScatter and Attention: TensorRT's KVCacheUpdate and a fused kernel.

A cache is a graph input [rows, heads, capacity, size] and a graph output of the same shape; TensorRT requires both at
one address and writes the new keys and values in place. Its capacity is fixed in the engine. For ONNX Runtime the
capacity is read from the cache.

Only new tokens are written. Padded positions of a row, and all positions of a row without new tokens (whose
`past_lengths` may be 0 whatever it holds), get their old contents back, so padding, NaN or not, never enters a cache.
Caches must start as zeros: what a mask hides is still multiplied by 0.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of, static
from stageline.runtime.bundle.manifest import BATCH, CacheSpec
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.precision import INSTEAD_OF

_OPSET = 24  # the first with TensorScatter
_FUSED_STEP = 8  # TensorRT has attention kernels for head sizes that are multiples of this
_HIDDEN = -1e30


def to_tensor_scatter(model: ir.Model, capacity: int | None) -> tuple[CacheSpec, ...]:
    """Lower `model`, whose activations are float32, in place, with caches of `capacity` tokens (None: of any number).

    Returns the caches."""
    lowering = _TensorScatterLowering(model.graph, capacity)
    caches = tuple(lowering.lower(node) for node in [n for n in model.graph if n.op_type == CACHE_ATTENTION])
    model.graph.opset_imports.pop("stageline", None)
    if caches:
        model.graph.opset_imports[""] = max(_OPSET, model.graph.opset_imports[""])
    RemoveUnusedNodesPass()(model)
    return caches


class _TensorScatterLowering:
    def __init__(self, graph: ir.Graph, capacity: int | None) -> None:
        self.graph, self.capacity = graph, capacity
        self.rows: dict[tuple[ir.Value, ir.Value], _Rows] = {}
        self.masks: dict[tuple[_Rows, int | None], ir.Value] = {}
        self.constants: dict[tuple[object, ...], ir.Value] = {}
        self.capacities: ir.Value | None = None
        self.count = 0
        self.at: ir.Node  # new nodes go before this one
        self.instead_of: str | None = None  # the node whose values, apart from the caches, new nodes compute

    def add(self, op: str, *inputs: ir.Value, name: str | None = None, **attributes: object) -> ir.Value:
        self.count += 1
        node = ir.node(op, inputs, attributes or None, name=f"cache_attention.{self.count}")  # type: ignore[arg-type]
        node.outputs[0].name = name or node.name
        if self.instead_of is not None:
            node.meta[INSTEAD_OF] = self.instead_of
        self.graph.insert_before(self.at, node)
        return node.outputs[0]

    def constant(self, values: object, dtype: type = np.int64) -> ir.Value:
        array: Array = np.asarray(values, dtype)
        key = (array.tobytes(), array.shape, dtype)
        if key not in self.constants:
            data = ir.tensor(array, name=f"cache_attention.constant.{len(self.constants)}")
            value = ir.Value(
                name=data.name, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype), const_value=data
            )
            self.graph.register_initializer(value)
            self.constants[key] = value
        return self.constants[key]

    def lower(self, node: ir.Node) -> CacheSpec:
        self.at = node
        query, key, value, past, new, *sinks = node.inputs
        assert query is not None
        assert key is not None
        assert value is not None
        assert past is not None
        assert new is not None
        cache = cache_of(node, node.attributes["cache"].as_string())
        if (past, new) not in self.rows:
            self.rows[past, new] = _Rows(self, query, past, new)
        rows = self.rows[past, new]
        keys, values = (
            self.kept(rows, past_name, present_name, update, cache.heads, size)
            for past_name, present_name, update, size in zip(
                past_names(cache.name),
                present_names(cache.name),
                (key, value),
                (cache.key_size, cache.value_size),
                strict=True,
            )
        )
        window = node.attributes["window"].as_int() if "window" in node.attributes else None
        if (rows, window) not in self.masks:
            self.masks[rows, window] = rows.mask(self, window)
        mask, scale = self.masks[rows, window], node.attributes["scale"].as_float()
        softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else None
        sink = sinks[0] if sinks else None
        self.instead_of = node.name
        fused = cache.key_size == cache.value_size and cache.key_size % _FUSED_STEP == 0
        if fused and softcap is None and sink is None:
            attended = self.add("Attention", query, keys, values, mask, scale=scale)
        else:
            attended = self.attend(query, keys, values, mask, scale, softcap, sink, cache)
        result = self.add("Transpose", attended, perm=[0, 2, 1, 3])
        self.instead_of = None
        result.name, result.shape, result.type = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        return cache

    def kept(self, rows: "_Rows", past: str, present: str, update: ir.Value, heads: int, size: int) -> ir.Value:
        """The cache after this step."""
        capacity = "capacity" if self.capacity is None else self.capacity
        shape, dtype = ir.Shape([BATCH, heads, capacity, size]), ir.TensorType(ir.DataType.FLOAT)
        before = ir.Value(name=past, shape=shape, type=dtype)
        self.graph.inputs.append(before)
        if self.capacities is None:
            fixed = self.capacity is not None
            self.capacities = self.constant([self.capacity]) if fixed else self.add("Shape", before, start=2, end=3)
        held = self.add("Slice", before, self.constant([0]), rows.length, self.constant([2]))
        written = self.add("Where", rows.is_new, update, held)
        after = self.add("TensorScatter", before, written, rows.write_at, name=present, axis=2)
        after.shape, after.type = shape, dtype
        self.graph.outputs.append(after)
        return after

    def attend(
        self,
        query: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        mask: ir.Value,
        scale: float,
        softcap: float | None,
        sink: ir.Value | None,
        cache: CacheSpec,
    ) -> ir.Value:
        """Attention in plain operators, for what the fused one cannot do. [batch, heads, length, value size]."""
        heads = static(query, 1)
        scaled = self.add("Mul", query, self.constant(scale, np.float32))
        # Heads that share a key are joined along the length, so that the products have four dimensions.
        grouped = self.add("Reshape", scaled, self.constant([0, cache.heads, -1, cache.key_size]))
        scores = self.add("MatMul", grouped, self.add("Transpose", keys, perm=[0, 1, 3, 2]))
        assert self.capacities is not None
        scores = self.add("Reshape", scores, self.sizes(0, heads, -1))
        if softcap is not None:
            cap = self.constant(softcap, np.float32)
            scores = self.add("Mul", self.add("Tanh", self.add("Div", scores, cap)), cap)
        scores = self.add("Where", mask, scores, self.constant(_HIDDEN, np.float32))
        if sink is None:
            weights = self.add("Softmax", scores, axis=-1)
        else:
            column = self.add("Reshape", sink, self.constant([1, heads, 1, 1]))
            size = self.add("Concat", self.add("Shape", scores, start=0, end=3), self.constant([1]), axis=0)
            column = self.add("Expand", column, size)
            weights = self.add("Softmax", self.add("Concat", scores, column, axis=-1), axis=-1)
            ends = (self.constant([0]), self.capacities, self.constant([3]))
            weights = self.add("Slice", weights, *ends)
        weights = self.add("Reshape", weights, self.sizes(0, cache.heads, -1))
        attended = self.add("MatMul", weights, values)
        return self.add("Reshape", attended, self.constant([0, heads, -1, cache.value_size]))

    def sizes(self, *sizes: int) -> ir.Value:
        """A shape of these sizes and the capacity."""
        if self.capacity is not None:
            return self.constant([*sizes, self.capacity])
        assert self.capacities is not None
        return self.add("Concat", self.constant(sizes), self.capacities, axis=0)


class _Rows:
    """What all caches of a stage share: where each row writes, and which positions of `length` are new."""

    def __init__(self, lowering: _TensorScatterLowering, query: ir.Value, past: ir.Value, new: ir.Value) -> None:
        zero, axes = lowering.constant(0), lowering.constant([1, 2, 3])
        self.length = lowering.add("Shape", query, start=2, end=3)
        count = lowering.add("Squeeze", self.length, lowering.constant([0]))
        places = lowering.add("Range", zero, count, lowering.constant(1))
        places = lowering.add("Unsqueeze", places, lowering.constant([0, 1, 3]))  # [1, 1, length, 1]
        self.is_new = lowering.add("Less", places, lowering.add("Unsqueeze", new, axes))
        self.positions = lowering.add("Add", lowering.add("Unsqueeze", past, axes), places)  # [batch, 1, length, 1]
        self.write_at = lowering.add("Where", lowering.add("Greater", new, zero), past, zero)

    def mask(self, lowering: _TensorScatterLowering, window: int | None) -> ir.Value:
        """Which positions of the cache each query sees: bool [batch, 1, length, capacity]. At least one, because a row
        and its padding fit the capacity."""
        if lowering.capacity is not None:
            cached = lowering.constant(np.arange(lowering.capacity))
        else:
            assert lowering.capacities is not None
            end = lowering.add("Squeeze", lowering.capacities, lowering.constant([0]))
            cached = lowering.add("Range", lowering.constant(0), end, lowering.constant(1))
        seen = lowering.add("LessOrEqual", cached, self.positions)
        if window is None:
            return seen
        first = lowering.add("Sub", self.positions, lowering.constant(window))
        return lowering.add("And", seen, lowering.add("Greater", cached, first))

"""Lower cache attention to ONNX Runtime's GroupQueryAttention, with the caches as inputs and outputs of the graph.

The past and the present of a cache must be bound to one buffer: the operator then writes the new keys and values in
place and copies nothing. Its `query_seqlens` allows rows that are padded on the right, and rows without new tokens.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of, static
from stageline.runtime.engines.lowering.cache_names import past_names, present_names

_DOMAIN = "com.microsoft"
_STEP = 8  # the operator takes head sizes that are multiples of this


def padded(size: int) -> int:
    """The head size that the operator needs for heads of `size`."""
    return -(-size // _STEP) * _STEP


def has_caches(model: ir.Model) -> bool:
    """Whether the model has cache attention."""
    return any(node.op_type == CACHE_ATTENTION for node in model.graph)


def to_group_query(model: ir.Model, cache_dtype: ir.DataType) -> ir.Model:
    """Lower `model` in place and return it. Its activations have one floating type; they are cast to `cache_dtype` for
    the operator and back."""
    graph = model.graph
    lowering = _GroupQueryLowering(graph, cache_dtype)
    for node in [node for node in graph if node.op_type == CACHE_ATTENTION]:
        lowering.lower(node)
    graph.opset_imports.pop("stageline", None)
    graph.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return model


class _GroupQueryLowering:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.lengths: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.count = 0
        self.at: ir.Node  # new nodes go before this one
        self.activations: ir.DataType  # their type, at `at`

    def add(self, op: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        domain = _DOMAIN if op == "GroupQueryAttention" else ""
        node = ir.node(op, inputs, dict(attributes) or None, domain=domain)  # type: ignore[arg-type]
        return self.insert(node)

    def insert(self, node: ir.Node) -> ir.Value:
        self.count += 1
        node.name = f"cache_attention.{self.count}"
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}.{place}"
        self.graph.insert_before(self.at, node)
        return node.outputs[0]

    def ints(self, values: list[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return self.add("Constant", [], value=ir.tensor(values, dtype=dtype))

    def lower(self, node: ir.Node) -> None:
        self.at = node
        query, key, value, past, new, *sinks = node.inputs
        assert query is not None
        assert past is not None
        assert new is not None
        self.activations = query.dtype or ir.DataType.FLOAT
        cache = cache_of(node, node.attributes["cache"].as_string())
        heads, size = static(query, 1), padded(max(cache.key_size, cache.value_size))
        seqlens, total, lengths = self.row_lengths(past, new, query)
        flat = [self.flat(query, heads, cache.key_size, size), self.flat(key, cache.heads, cache.key_size, size)]
        flat.append(self.flat(value, cache.heads, cache.value_size, size))
        buffers = [self.buffer(name, cache.heads, size) for name in past_names(cache.name)]
        self.graph.inputs.extend(buffers)
        sink = self.cast(sinks[0], self.dtype) if sinks and sinks[0] is not None else None
        attention = ir.node(
            "GroupQueryAttention",
            [*flat, *buffers, seqlens, total, None, None, None, None, sink, None, None, None, None, lengths],
            {
                "num_heads": heads,
                "kv_num_heads": cache.heads,
                "scale": node.attributes["scale"].as_float(),
                "softcap": node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0,
                "local_window_size": node.attributes["window"].as_int() if "window" in node.attributes else -1,
            },
            domain=_DOMAIN,
            num_outputs=3,
        )
        result = self.insert(attention)
        for name, value in zip(present_names(cache.name), attention.outputs[1:], strict=True):
            value.name, value.shape, value.type = name, buffers[0].shape, ir.TensorType(self.dtype)
            self.graph.outputs.append(value)
        result = self.cast(result, self.activations)
        joined = _joined(node.outputs[0])
        if joined is not None and size == cache.value_size:
            ir.convenience.replace_all_uses_with(joined, result, replace_graph_outputs=True)
            self.graph.remove(joined.producer(), safe=True)  # type: ignore[arg-type]
        else:
            result = self.add("Reshape", [result, self.ints([0, 0, heads, size])])
            if size != cache.value_size:
                ends = [self.ints([0]), self.ints([cache.value_size]), self.ints([3])]
                result = self.add("Slice", [result, *ends])
            result.name = node.outputs[0].name  # it may be an output of the graph
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def row_lengths(self, past: ir.Value, new: ir.Value, query: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The operator's lengths: per row, its tokens after this step minus one; an upper bound of them; per row, its
        new tokens."""
        if (past, new) not in self.lengths:
            after = self.add("Add", [past, new])
            one = self.ints([1])
            after = self.add("Max", [after, one])  # a row that stays empty counts as one token, which nothing reads
            length = self.add("Shape", [query], start=2, end=3)
            total = self.add("Max", [self.add("ReduceMax", [after], keepdims=1), length])
            values = (self.add("Sub", [after, one]), total, new)
            seqlens, total, lengths = (self.add("Cast", [v], to=ir.DataType.INT32) for v in values)
            self.lengths[past, new] = seqlens, total, lengths
        return self.lengths[past, new]

    def flat(self, value: ir.Value | None, heads: int, size: int, wanted: int) -> ir.Value:
        """[batch, heads, length, size] -> [batch, length, heads * wanted], padded with zeros."""
        assert value is not None
        if size == wanted and (before := _before_split(value, heads * size)) is not None:
            return self.cast(before, self.dtype)
        rotary = value.producer()
        if size == wanted and rotary is not None and rotary.op_type == "RotaryEmbedding":
            before = _before_split(rotary.inputs[0], heads * size)
            if before is not None:
                turned = ir.node("RotaryEmbedding", [before, *rotary.inputs[1:]], dict(rotary.attributes))
                turned.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
                return self.cast(self.insert(turned), self.dtype)
        result = self.add("Transpose", [value], perm=[0, 2, 1, 3])
        if size != wanted:
            result = self.add("Pad", [result, self.ints([0, 0, 0, 0, 0, 0, 0, wanted - size])])
        return self.cast(self.add("Reshape", [result, self.ints([0, 0, heads * wanted])]), self.dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if self.dtype == self.activations else self.add("Cast", [value], to=dtype)

    def buffer(self, name: str, heads: int, size: int) -> ir.Value:
        shape = ir.Shape(["batch", heads, "capacity", size])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(self.dtype))


def _before_split(value: ir.Value | None, width: int) -> ir.Value | None:
    """The [batch, length, width] that is only split into heads and transposed to become `value`, if there is one."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose" or list(_ints(transpose, "perm")) != [0, 2, 1, 3]:
        return None
    split = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if split is None or split.op_type != "Reshape":
        return None
    before = split.inputs[0]
    if before is None or before.shape is None or len(before.shape) != 3 or before.shape[2] != width:
        return None
    return before


def _joined(value: ir.Value) -> ir.Value | None:
    """The output of the Reshape that joins the heads of `value` [batch, length, heads, size], if that is its only
    use."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or value.shape is None:
        return None
    joined = uses[0].node.outputs[0]
    if joined.shape is None or len(joined.shape) != 3:
        return None
    width = joined.shape[2]
    return joined if isinstance(width, int) and width == static(value, 2) * static(value, 3) else None


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else ()

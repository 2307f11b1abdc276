"""What ONNX Runtime's attention operators have in common: heads side by side in one dimension, and caches as inputs and
outputs of the graph."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of, static
from stageline.runtime.bundle.manifest import CacheSpec
from stageline.runtime.engines.lowering.cache_names import past_names, present_names

_DOMAIN = "com.microsoft"
_STEP = 8  # the operators take head sizes that are multiples of this


def padded_size(cache: CacheSpec) -> int:
    """The head size of a cache's keys and values: the operators take equal ones that are multiples of 8."""
    return -(-max(cache.key_size, cache.value_size) // _STEP) * _STEP


def has_caches(model: ir.Model) -> bool:
    """Whether the model has cache attention."""
    return any(node.op_type == CACHE_ATTENTION for node in model.graph)


@dataclass(frozen=True)
class Attention:
    """What the operator reads: query, key and value [batch, length, heads * size], the lengths of the rows, and the
    sinks of its heads."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past: ir.Value
    new: ir.Value
    sink: ir.Value | None
    caches: tuple[ir.Value, ir.Value]
    size: int
    attributes: dict[str, int | float]


class FlatLowering(ABC):
    """Replaces the cache attention of a graph by the operator of a subclass. Activations have one floating type; they
    are cast to `dtype` for the operator and back."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.count = 0
        self.at: ir.Node  # new nodes go before this one
        self.activations: ir.DataType  # their type, at `at`

    @abstractmethod
    def cache_shape(self, cache: CacheSpec) -> ir.Shape:
        """The shape of a cache's keys, and of its values."""

    @abstractmethod
    def attend(self, attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Add the operator. Returns its result [batch, length, heads * size], and the caches after it."""

    def add(self, op: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        """Add a standard operator and return its result."""
        return self.insert(ir.node(op, inputs, dict(attributes) or None))[0]  # type: ignore[arg-type]

    def add_fused(self, op: str, inputs: list[ir.Value | None], attributes: dict[str, int | float]) -> list[ir.Value]:
        """Add an operator of ONNX Runtime, with a result and two caches."""
        outputs = self.insert(ir.node(op, inputs, attributes, domain=_DOMAIN, num_outputs=3))
        outputs[0].type = ir.TensorType(self.dtype)  # ONNX does not know the operator
        return outputs

    def insert(self, node: ir.Node) -> list[ir.Value]:
        """Put a node before the cache attention that is replaced, and return its outputs."""
        self.count += 1
        node.name = f"cache_attention.{self.count}"
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}.{place}"
        self.graph.insert_before(self.at, node)
        return list(node.outputs)

    def ints(self, values: list[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A constant vector."""
        return self.add("Constant", [], value=ir.tensor(values, dtype=dtype))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """An activation in `dtype`, which is the operator's type or that of the other activations."""
        return value if self.dtype == self.activations else self.add("Cast", [value], to=dtype)

    def lower(self, node: ir.Node) -> None:
        """Replace one cache attention."""
        self.at = node
        query, key, value, past, new, *sinks = node.inputs
        assert query is not None
        assert past is not None
        assert new is not None
        self.activations = query.dtype or ir.DataType.FLOAT
        cache = cache_of(node, node.attributes["cache"].as_string())
        heads, size = static(query, 1), padded_size(cache)
        queries = self.flat(query, heads, cache.key_size, size)
        keys = self.flat(key, cache.heads, cache.key_size, size)
        values = self.flat(value, cache.heads, cache.value_size, size)
        shape, dtype = self.cache_shape(cache), ir.TensorType(self.dtype)
        key_cache, value_cache = (ir.Value(name=name, shape=shape, type=dtype) for name in past_names(cache.name))
        self.graph.inputs.extend([key_cache, value_cache])
        sink = self.cast(sinks[0], self.dtype) if sinks and sinks[0] is not None else None
        attributes: dict[str, int | float] = {
            "num_heads": heads,
            "kv_num_heads": cache.heads,
            "scale": node.attributes["scale"].as_float(),
            "softcap": node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0,
            "local_window_size": node.attributes["window"].as_int() if "window" in node.attributes else -1,
        }
        result, *after = self.attend(
            Attention(queries, keys, values, past, new, sink, (key_cache, value_cache), size, attributes)
        )
        for name, present in zip(present_names(cache.name), after, strict=True):
            present.name, present.shape, present.type = name, shape, dtype
            self.graph.outputs.append(present)
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
            old = node.outputs[0]  # it may be an output of the graph
            result.name, result.shape, result.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

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
                return self.cast(self.insert(turned)[0], self.dtype)
        result = self.add("Transpose", [value], perm=[0, 2, 1, 3])
        if size != wanted:
            result = self.add("Pad", [result, self.ints([0, 0, 0, 0, 0, 0, 0, wanted - size])])
        return self.cast(self.add("Reshape", [result, self.ints([0, 0, heads * wanted])]), self.dtype)


def lower_all(model: ir.Model, lowering: FlatLowering) -> ir.Model:
    """Lower all cache attention of `model` in place and return it."""
    for node in [node for node in model.graph if node.op_type == CACHE_ATTENTION]:
        lowering.lower(node)
    model.graph.opset_imports.pop("stageline", None)
    model.graph.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return model


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

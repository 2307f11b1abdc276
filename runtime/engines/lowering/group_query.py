"""Lower cache attention to ONNX Runtime's GroupQueryAttention, with the caches as inputs and outputs of the graph.

The past and the present of a cache must be bound to one buffer: the operator then writes the new keys and values in
place and copies nothing. Its `query_seqlens` allows rows that are padded on the right, and rows without new tokens.
"""

import onnx_ir as ir
from stageline.runtime.bundle.manifest import BATCH, CacheSpec
from stageline.runtime.engines.lowering.flat_attention import Attention, FlatLowering, lower_all, padded_size


def to_group_query(model: ir.Model, cache_dtype: ir.DataType) -> ir.Model:
    """Lower `model` in place and return it. Its activations have one floating type; they are cast to `cache_dtype` for
    the operator and back."""
    return lower_all(model, _GroupQueryLowering(model.graph, cache_dtype))


class _GroupQueryLowering(FlatLowering):
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        super().__init__(graph, dtype)
        self.lengths: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def cache_shape(self, cache: CacheSpec) -> ir.Shape:
        return ir.Shape([BATCH, cache.heads, "capacity", padded_size(cache)])

    def attend(self, attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value]:
        seqlens, total, lengths = self.row_lengths(attention)
        flat = [attention.query, attention.key, attention.value, *attention.caches]
        unused = [None] * 4
        inputs = [*flat, seqlens, total, *unused, attention.sink, *unused, lengths]
        result, keys, values = self.add_fused("GroupQueryAttention", inputs, attention.attributes)
        return result, keys, values

    def row_lengths(self, attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The operator's lengths: per row, its tokens after this step minus one; an upper bound of them; per row, its
        new tokens."""
        past, new = attention.past, attention.new
        if (past, new) not in self.lengths:
            after = self.add("Add", [past, new])
            one = self.ints([1])
            after = self.add("Max", [after, one])  # a row that stays empty counts as one token, which nothing reads
            length = self.add("Shape", [attention.query], start=1, end=2)
            total = self.add("Max", [self.add("ReduceMax", [after], keepdims=1), length])
            values = (self.add("Sub", [after, one]), total, new)
            seqlens, total, lengths = (self.add("Cast", [v], to=ir.DataType.INT32) for v in values)
            self.lengths[past, new] = seqlens, total, lengths
        return self.lengths[past, new]

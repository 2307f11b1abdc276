"""Lower cache attention to ONNX Runtime's GroupQueryAttention, with the caches as inputs and outputs of the graph.

The past and the present of a cache must be bound to one buffer: the operator then writes the new keys and values in
place and copies nothing. It wants rows, of which each is a row of the caches, and passes over padding on their right
and rows without new tokens (`query_seqlens`). The graph computes on packed tokens, [tokens, 1, ...]: they are put into
rows for the operator alone, and taken out again.
"""

import numpy as np
import onnx_ir as ir
from stageline.runtime.bundle.manifest import BATCH, CacheSpec
from stageline.runtime.engines.base import Array, PackedRows
from stageline.runtime.engines.lowering.flat_attention import Attention, FlatLowering, lower_all, padded_size

_INPUTS = {
    "attention.places": (("rows", "width"), ir.DataType.INT64),
    "attention.tokens": ((BATCH,), ir.DataType.INT64),
    "attention.last": (("rows",), ir.DataType.INT32),
    "attention.most": ((1,), ir.DataType.INT32),
    "attention.new": (("rows",), ir.DataType.INT32),
}
ROW_INPUTS = tuple(_INPUTS)
"""The inputs that a lowered graph has besides its own; `row_inputs` computes them."""


def row_inputs(rows: PackedRows) -> tuple[dict[str, Array], int, int]:
    """The further inputs of a lowered graph, and the range of cache rows to bind: the first one, and how many.

    They are: for each place in the rows the token that goes there, and for each token its place; of each row its tokens
    after this step but one, and the new ones; a bound on the former, and 1.
    """
    first = int(rows.slots.min())
    count, width = int(rows.slots.max()) - first + 1, int(rows.counts.max())
    begins = np.cumsum(rows.counts) - rows.counts
    tokens = np.arange(int(rows.counts.sum()))
    at = tokens + np.repeat((rows.slots - first) * width - begins, rows.counts)
    places = np.zeros(count * width, np.int64)
    places[at] = tokens
    last, new = np.zeros((2, count), np.int32)
    last[rows.slots - first] = rows.past + rows.counts - 1
    new[rows.slots - first] = rows.counts
    most = np.array([max(int(last.max()) + 1, width)], np.int32)
    return dict(zip(_INPUTS, (places.reshape(count, width), at, last, most, new), strict=True)), first, count


def to_group_query(model: ir.Model, cache_dtype: ir.DataType) -> ir.Model:
    """Lower `model` in place and return it. Its activations have one floating type; they are cast to `cache_dtype` for
    the operator and back."""
    return lower_all(model, _GroupQueryLowering(model.graph, cache_dtype))


class _GroupQueryLowering(FlatLowering):
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        super().__init__(graph, dtype)
        self.places, self.tokens, *self.lengths = (
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
            for name, (shape, kind) in _INPUTS.items()
        )
        graph.inputs.extend([self.places, self.tokens, *self.lengths])

    def cache_shape(self, cache: CacheSpec) -> ir.Shape:
        return ir.Shape(["rows", cache.heads, "capacity", padded_size(cache)])

    def attend(self, attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value]:
        size, heads, kv_heads = attention.size, attention.attributes["num_heads"], attention.attributes["kv_num_heads"]
        flat = (attention.query, heads), (attention.key, kv_heads), (attention.value, kv_heads)
        rows = [self.add("Gather", [self.reshaped(v, int(n) * size), self.places], axis=0) for v, n in flat]
        past, total, new = self.lengths
        unused = [None] * 4
        inputs = [*rows, *attention.caches, past, total, *unused, attention.sink, *unused, new]
        result, keys, values = self.add_fused("GroupQueryAttention", inputs, attention.attributes)
        width = int(heads) * size
        tokens = self.add("Gather", [self.reshaped(result, width), self.tokens], axis=0)
        return self.add("Reshape", [tokens, self.ints([-1, 1, width])]), keys, values

    def reshaped(self, value: ir.Value, width: int) -> ir.Value:
        """[..., width] -> [places, width]."""
        return self.add("Reshape", [value, self.ints([-1, width])])

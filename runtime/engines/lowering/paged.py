"""Lower cache attention to ONNX Runtime's PagedAttention, which has kernels for CUDA, with caches as blocks of tokens.

A cache is one graph input, and the same buffer as an output, [blocks, BLOCK, heads, size]: the operator writes new keys
and values into the places of `places`, and reads a row's from the blocks of `block_table`. A padded batch is given as a
packed one whose rows all have its length. Padding is not written anywhere, and what it attends to is of no consequence.
So padding never enters a cache, rows without new tokens keep theirs, and a row is attended to as far as it goes,
not over its capacity. The operator reads the bounds on the host: nothing waits for a copy of them.
"""

import numpy as np
import onnx_ir as ir
from stageline.runtime.bundle.manifest import CacheSpec
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.flat_attention import Attention, FlatLowering, lower_all, padded_size

BLOCK = 256  # tokens; flash attention reads tiles of this many keys of heads of up to 64, which must not cross blocks
BOUNDS = "attention.bounds"  # the one that the host reads
_INPUTS = {
    "attention.row_ends": ("rows_and_one",),
    "attention.past": ("batch",),
    "attention.block_table": ("batch", "blocks_of_a_row"),
    "attention.places": ("tokens",),
    BOUNDS: (3,),
}
PAGED_INPUTS = tuple(_INPUTS)
"""The inputs that a lowered graph has besides its own, all int32; `paged_inputs` computes them."""


def to_paged(model: ir.Model, cache_dtype: ir.DataType) -> ir.Model:
    """Lower `model` in place and return it. Its activations have one floating type; they are cast to `cache_dtype` for
    the operator and back. The operator's kernels are for float16 and bfloat16."""
    return lower_all(model, _PagedLowering(model.graph, cache_dtype))


def blocks(tokens: int) -> int:
    """Blocks that hold `tokens` tokens of a row."""
    return -(-tokens // BLOCK)


def paged_inputs(past: Array, new: Array, length: int, first_slot: int, capacity: int) -> dict[str, Array]:
    """The further inputs of a lowered graph, int32, for rows in slots `first_slot` and on, `length` tokens wide.

    past, new: int64 [rows]. A slot is `blocks(capacity)` blocks. The bounds are powers of two, between which the
    longest row lies: steps with equal bounds can be replayed.
    """
    rows, row_blocks = len(past), blocks(capacity)
    offsets = np.arange(length, dtype=np.int64)
    slots = first_slot + np.arange(rows, dtype=np.int64)[:, None]
    places = slots * (row_blocks * BLOCK) + past[:, None] + offsets
    places[offsets >= new[:, None]] = -1
    most = min(1 << (max(int(past.max()) + length, BLOCK) - 1).bit_length(), row_blocks * BLOCK)
    arrays = (
        np.arange(rows + 1) * length,
        past,
        slots * row_blocks + np.arange(row_blocks),
        places.reshape(-1),
        np.array([length, most, most // 2 if most > BLOCK else 0]),
    )
    return {name: array.astype(np.int32) for name, array in zip(_INPUTS, arrays, strict=True)}


class _PagedLowering(FlatLowering):
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        super().__init__(graph, dtype)
        self.extra = [
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
            for name, shape in _INPUTS.items()
        ]
        graph.inputs.extend(self.extra)
        self.shapes: dict[int, ir.Value] = {}

    def cache_shape(self, cache: CacheSpec) -> ir.Shape:
        return ir.Shape(["blocks", BLOCK, cache.heads, padded_size(cache)])

    def attend(self, attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value]:
        size, heads = attention.size, int(attention.attributes["num_heads"])
        widths = [heads * size, *[int(attention.attributes["kv_num_heads"]) * size] * 2]
        if widths[0] not in self.shapes:
            self.shapes[widths[0]] = self.add("Shape", [attention.query])
        flat = (attention.query, attention.key, attention.value)
        packed = [self.add("Reshape", [v, self.ints([-1, w])]) for v, w in zip(flat, widths, strict=True)]
        row_ends, past, block_table, places, bounds = self.extra
        unused = [None] * 2
        inputs = [*packed, *attention.caches, row_ends, past, block_table, *unused, places, attention.sink]
        inputs += [*unused, *unused, bounds]
        result, keys, values = self.add_fused("PagedAttention", inputs, attention.attributes)
        return self.add("Reshape", [result, self.shapes[widths[0]]]), keys, values

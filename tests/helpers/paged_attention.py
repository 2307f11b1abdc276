"""ONNX Runtime's PagedAttention in standard operators, written from its documentation: it has no kernel for CPUs.

token t's key and value go to place slot_mapping[t] of the cache as [blocks * block_size, heads, size]; -1: nowhere
token t is of the row r whose range of cumulative_sequence_length holds it, at position past_seqlens[r] + its offset
it attends to the positions up to its own, no further back than the window, of the blocks block_table[r]
a sink adds to the denominator of the softmax
"""

from typing import Any

import numpy as np
import onnx_ir as ir


def expand(model: ir.Model) -> None:
    """Replace every PagedAttention of `model`, whose floating values are float32, in place."""
    for node in [node for node in model.graph if node.op_type == "PagedAttention"]:
        _Expansion(model.graph, node).replace()


class _Expansion:
    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.count = graph, node, 0

    def add(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        new = ir.node(op, inputs, attributes or None, name=f"{self.node.name}.expanded.{self.count}")
        new.outputs[0].name = new.name
        self.count += 1
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def constant(self, values: Any, dtype: type = np.int64) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.asarray(values, dtype)))

    def long(self, value: ir.Value | None) -> ir.Value:
        return self.add("Cast", value, to=ir.DataType.INT64)

    def replace(self) -> None:
        node, add, constant = self.node, self.add, self.constant
        query, key, value, *caches = node.inputs[:5]
        ends, past, table, places = (self.long(node.inputs[n]) for n in (5, 6, 7, 10))
        sink = node.inputs[11]
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        group = heads // kv_heads

        after = []
        for cache, update in zip(caches, (key, value), strict=True):
            assert cache is not None
            assert cache.shape is not None
            size = int(cache.shape[3])  # type: ignore[arg-type]
            flat = add("Reshape", cache, constant([-1, kv_heads, size]))
            count = add("Shape", flat, start=0, end=1)
            # One place more, for what goes nowhere.
            zeros = add("ConstantOfShape", constant([1, kv_heads, size]), value=ir.tensor(np.zeros(1, np.float32)))
            nowhere = add("Less", places, constant(0))
            at = add("Unsqueeze", add("Where", nowhere, count, places), constant([1]))
            rows = add("Reshape", update, constant([-1, kv_heads, size]))
            written = add("ScatterND", add("Concat", flat, zeros, axis=0), at, rows)
            kept = add("Slice", written, constant([0]), count, constant([0]))
            after.append(add("Reshape", kept, add("Shape", cache)))

        tokens = add(
            "Range", constant(0), add("Squeeze", add("Shape", query, start=0, end=1), constant([0])), constant(1)
        )
        row_ends = add("Slice", ends, constant([1]), constant([2**31]), constant([0]))
        before = add("LessOrEqual", add("Unsqueeze", row_ends, constant([0])), add("Unsqueeze", tokens, constant([1])))
        row = add("ReduceSum", self.long(before), constant([1]), keepdims=0)
        position = add("Add", add("Gather", past, row), add("Sub", tokens, add("Gather", ends, row)))

        token_blocks = add("Gather", table, row)  # [tokens, blocks of a row]
        keys, values = (
            add("Reshape", add("Gather", cache, token_blocks), constant([0, -1, kv_heads, size])) for cache in after
        )
        split = add("Reshape", query, constant([0, kv_heads, group, size]))
        scores = add("Einsum", split, keys, equation="tkgs,tlks->tkgl")
        scores = add("Mul", scores, constant(node.attributes["scale"].as_float(), np.float32))
        softcap = node.attributes["softcap"].as_float()
        if softcap:
            cap = constant(softcap, np.float32)
            scores = add("Mul", add("Tanh", add("Div", scores, cap)), cap)
        length = add("Squeeze", add("Shape", scores, start=3, end=4), constant([0]))
        places_of_keys = add("Range", constant(0), length, constant(1))
        own = add("Unsqueeze", position, constant([1, 2, 3]))
        seen = add("LessOrEqual", places_of_keys, own)
        window = node.attributes["local_window_size"].as_int()
        if window > 0:
            seen = add("And", seen, add("Greater", places_of_keys, add("Sub", own, constant(window))))
        scores = add("Where", seen, scores, constant(-1e30, np.float32))
        if sink is not None:
            column = add("Reshape", sink, constant([1, kv_heads, group, 1]))
            shape = add("Concat", add("Shape", scores, start=0, end=3), constant([1]), axis=0)
            scores = add("Concat", scores, add("Expand", column, shape), axis=-1)
        weights = add("Softmax", scores, axis=-1)
        if sink is not None:
            weights = add("Slice", weights, constant([0]), constant([-1]), constant([3]))
        attended = add("Einsum", weights, values, equation="tkgl,tlks->tkgs")
        result = add("Reshape", attended, constant([0, heads * size]))

        for old, new in zip(node.outputs, (result, *after), strict=True):
            name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name = f"{name}.replaced"
            new.name = name
        self.graph.remove(node, safe=True)

"""The graph that draws the next token of every row on a device: what generation/sampling.py does on the host.

top_k, top_p and min_p are done among the likeliest CANDIDATES; where they leave more, the status says so, and the host
draws. A row that they do not cut draws from all tokens: first a block of them, then one of the block, so that no sum
runs over the whole vocabulary.
"""

import math

import numpy as np
import onnx_ir as ir

CANDIDATES = 128
SETTINGS = ("inverse_temperature", "top_k", "top_p", "min_p", "uniform", "greedy")
"""The columns of the settings. top_k 0 and top_p 1 cut nothing; 0 <= uniform < 1; greedy is 0 or 1."""
DONE, INCOMPLETE, NOT_FINITE = 0, 1, 2
"""The status of a row: its token is drawn; the host must draw it; its logits are no numbers."""
_OPSET = 21
_LARGE = 3e38


def draw_graph(vocabulary: int) -> bytes:
    """An ONNX graph. Inputs: `logits` float32 [rows, 1, vocabulary] and `settings` float32 [rows, 6]. Outputs: `token`
    int64 [rows, 1], and `drawn` int64 [rows, 2]: token and status."""
    return _DrawGraph(vocabulary).proto(greedy=False)


def greedy_graph(vocabulary: int) -> bytes:
    """The same for rows that are all greedy, in a tenth of the operators. It does not read the settings."""
    return _DrawGraph(vocabulary).proto(greedy=True)


def block_size(vocabulary: int) -> int:
    """The divisor of the vocabulary that is nearest to its root, by ratio."""
    root = math.isqrt(vocabulary)
    low = next(size for size in range(root, 0, -1) if vocabulary % size == 0)
    return vocabulary // low


class _DrawGraph:
    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.count = vocabulary, min(CANDIDATES, vocabulary)
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value, outputs: int = 1, **attributes: object) -> ir.Value:
        return self.add_all(op, *inputs, outputs=outputs, **attributes)[0]

    def add_all(self, op: str, *inputs: ir.Value, outputs: int, **attributes: object) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes or None, num_outputs=outputs, name=f"draw.{len(self.nodes)}")  # type: ignore[arg-type]
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}.{place}"
        self.nodes.append(node)
        return list(node.outputs)

    def number(self, value: float) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.float32(value)))

    def ints(self, *values: int) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(values, np.int64)))

    def column(self, values: ir.Value, place: int) -> ir.Value:
        """[rows, n] -> [rows, 1]."""
        return self.add("Slice", values, self.ints(place), self.ints(place + 1), self.ints(1))

    def as_float(self, values: ir.Value) -> ir.Value:
        return self.add("Cast", values, to=ir.DataType.FLOAT)

    def as_int(self, values: ir.Value) -> ir.Value:
        return self.add("Cast", values, to=ir.DataType.INT64)

    def sum(self, values: ir.Value, axis: int = 1) -> ir.Value:
        return self.add("ReduceSum", values, self.ints(axis), keepdims=1)

    def cumulated(self, values: ir.Value) -> ir.Value:
        return self.add("CumSum", values, self.add("Constant", value=ir.tensor(np.int64(1))))

    def looked_up(self, cumulated: ir.Value, size: int, target: ir.Value) -> ir.Value:
        """The first place whose sum is above `target`, or the last that weighs anything, should the product have been
        rounded up. int64 [rows, 1]."""
        total = self.column(cumulated, size - 1)
        place = self.sum(self.as_float(self.add("LessOrEqual", cumulated, target)))
        last = self.sum(self.as_float(self.add("Less", cumulated, total)))
        return self.as_int(self.add("Min", place, last))

    def proto(self, greedy: bool) -> bytes:
        logits = ir.Value(
            name="logits", shape=ir.Shape(["rows", 1, self.vocabulary]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        settings = ir.Value(
            name="settings", shape=ir.Shape(["rows", len(SETTINGS)]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        scores = self.add("Reshape", logits, self.ints(-1, self.vocabulary))
        token, finite, incomplete = self.likeliest(scores) if greedy else self.drawn(scores, settings)
        status = [self.add("Constant", value=ir.tensor(np.int64(n))) for n in (DONE, INCOMPLETE, NOT_FINITE)]
        drawable = self.add("Where", incomplete, status[1], status[0])
        drawn = self.add("Concat", token, self.add("Where", finite, drawable, status[2]), axis=1)
        for value, name, width in ((token, "token", 1), (drawn, "drawn", 2)):
            value.name, value.shape = name, ir.Shape(["rows", width])
            value.type = ir.TensorType(ir.DataType.INT64)
        inputs = [logits] if greedy else [logits, settings]
        graph = ir.Graph(inputs, [token, drawn], nodes=self.nodes, opset_imports={"": _OPSET}, name="draw")
        proto: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        return proto

    def finite(self, best: ir.Value, total: ir.Value) -> ir.Value:
        """Whether the largest logit and a sum over all are numbers: comparisons with what is none are false."""
        limit = self.number(_LARGE)
        return self.add(
            "And", self.add("Less", self.add("Abs", total), limit), self.add("Less", self.add("Abs", best), limit)
        )

    def likeliest(self, scores: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Token, whether the row is finite, and whether the host must draw. Of equal ones, ONNX wants TopK to give the
        first."""
        best, token = self.add_all("TopK", scores, self.ints(1), outputs=2, axis=1, largest=1, sorted=1)
        # Minus infinity stands for what may not be drawn.
        total = self.sum(self.add("Exp", self.add("Sub", scores, best)))
        return token, self.finite(best, total), self.add("Constant", value=ir.tensor(np.array([[False]])))

    def drawn(self, scores: ir.Value, settings: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The same by the settings of each row."""
        add, number = self.add, self.number
        inverse, top_k, top_p, min_p, uniform, greedy = (self.column(settings, n) for n in range(len(SETTINGS)))
        values, ids = self.add_all("TopK", scores, self.ints(self.count), outputs=2, axis=1, largest=1, sorted=1)
        best = self.column(values, 0)
        weights = add("Exp", add("Mul", add("Sub", scores, best), inverse))
        size = block_size(self.vocabulary)
        blocks = self.vocabulary // size
        block_weights = add("Reshape", weights, self.ints(-1, blocks, size))
        block_sums = add("Reshape", self.sum(block_weights, 2), self.ints(-1, blocks))
        total = self.sum(block_sums)
        from_all = self.from_blocks(block_weights, block_sums, blocks, size, uniform)
        from_few, incomplete = self.from_candidates(values, ids, best, total, (inverse, top_k, top_p, min_p, uniform))
        zero, one = number(0), number(1)
        is_greedy = add("Greater", greedy, zero)
        cut = add("Or", add("Greater", top_k, zero), add("Or", add("Less", top_p, one), add("Greater", min_p, zero)))
        token = add("Where", is_greedy, self.column(ids, 0), add("Where", cut, from_few, from_all))
        return token, self.finite(best, total), add("And", incomplete, add("Not", is_greedy))

    def from_blocks(self, weights: ir.Value, sums: ir.Value, blocks: int, size: int, uniform: ir.Value) -> ir.Value:
        """A token by the weights [rows, blocks, size] of all."""
        cumulated = self.cumulated(sums)
        target = self.add("Mul", uniform, self.column(cumulated, blocks - 1))
        block = self.looked_up(cumulated, blocks, target)
        before = self.add("GatherElements", cumulated, block, axis=1)
        before = self.add("Sub", before, self.add("GatherElements", sums, block, axis=1))
        own = self.add("GatherND", weights, block, batch_dims=1)  # [rows, size]
        place = self.looked_up(self.cumulated(own), size, self.add("Sub", target, before))
        return self.add("Add", self.add("Mul", block, self.ints(size)), place)

    def from_candidates(
        self, values: ir.Value, ids: ir.Value, best: ir.Value, total: ir.Value, settings: tuple[ir.Value, ...]
    ) -> tuple[ir.Value, ir.Value]:
        """A token of the likeliest, after top_k, top_p and min_p; and whether these leave more than the candidates."""
        inverse, top_k, top_p, min_p, uniform = settings
        add, number, zero, one = self.add, self.number, self.number(0), self.number(1)
        uses_k, uses_p, uses_m = add("Greater", top_k, zero), add("Less", top_p, one), add("Greater", min_p, zero)
        whole = self.count == self.vocabulary
        weights = add("Exp", add("Mul", add("Sub", values, best), inverse))
        place = add("Max", add("Sub", top_k, one), zero)
        edge = add("GatherElements", values, self.as_int(add("Min", place, number(self.count - 1))), axis=1)
        among = add("Or", add("GreaterOrEqual", values, edge), add("Not", uses_k))
        weights = add("Mul", weights, self.as_float(among))
        cumulated = self.cumulated(weights)
        left = add("Where", uses_k, self.column(cumulated, self.count - 1), total)
        count = self.sum(self.as_float(add("Less", cumulated, add("Mul", top_p, left))))
        places = add("Constant", value=ir.tensor(np.arange(self.count, dtype=np.float32)[None]))
        weights = add("Mul", weights, self.as_float(add("Or", add("LessOrEqual", places, count), add("Not", uses_p))))
        weights = add("Mul", weights, self.as_float(add("GreaterOrEqual", weights, min_p)))
        by_id, order = self.add_all("TopK", ids, self.ints(self.count), outputs=2, axis=1, largest=0, sorted=1)
        summed = self.cumulated(add("GatherElements", weights, order, axis=1))
        target = add("Mul", uniform, self.column(summed, self.count - 1))
        token = add("GatherElements", by_id, self.looked_up(summed, self.count, target), axis=1)

        last = self.column(values, self.count - 1)
        # The last candidate ties with the k-th, the nucleus reaches beyond it, or it is likely enough for min_p.
        ties = add("And", uses_k, add("GreaterOrEqual", last, edge))
        beyond = add("And", add("And", uses_p, add("Not", uses_k)), add("GreaterOrEqual", count, number(self.count)))
        likely = add("Exp", add("Mul", add("Sub", last, best), inverse))
        only_m = add("And", add("And", uses_m, add("Not", uses_k)), add("Not", uses_p))
        incomplete = add("Or", add("Or", ties, beyond), add("And", only_m, add("GreaterOrEqual", likely, min_p)))
        return token, add("And", incomplete, add("Not", add("Constant", value=ir.tensor(np.bool_(whole)))))

"""A check that the tokens of a row meet in cache attention alone: what else mixes them would have to be cached too."""

import math

import onnx_ir as ir
from stageline.exporter.cached import NotCachedError

_MIXES = frozenset({"Conv", "ConvTranspose", "CumSum", "Scan", "Loop", "LSTM", "GRU", "RNN", "AveragePool", "MaxPool"})
_ALONG = frozenset({"Softmax", "LogSoftmax", "Hardmax", "GatherElements", "ScatterElements", "TopK", "CumProd"})
_SIZES = frozenset({"Shape", "Size"})
_OTHER_DIMENSIONS = frozenset({"batch", "picks"})


def check_apart(graph: ir.Graph) -> None:
    """NotCachedError where a node other than CacheAttention mixes positions.

    Judged by shapes: every free dimension but `batch` and `picks` counts tokens, and a node may not contract it, lose
    it, or take and join parts of it. Places where logits are wanted (indices with the dimension `picks`) are chosen at
    the end, which is no mixing.
    """
    for node in graph:
        if node.op_type == "CacheAttention" or node.op_type in _SIZES:
            continue
        reads = [_dims(v) for v in node.inputs]
        if not any(_counts_tokens(d) for dims in reads for d in dims) or any("picks" in dims for dims in reads):
            continue
        if (reason := _mixing(node, reads)) is not None:
            raise NotCachedError(f"its tokens meet outside attention ({node.op_type} {reason})")


def _mixing(node: ir.Node, reads: list[list[str]]) -> str | None:
    if node.op_type in _MIXES:
        return "over tokens"
    if node.op_type in _ALONG and reads[0] and _counts_tokens(reads[0][_axis(node)]):
        return "along the tokens"
    summed = [reads[0][-1], reads[1][-2]] if node.op_type == "MatMul" and reads[0] and len(reads[1]) > 1 else []
    if any(_counts_tokens(dimension) for dimension in summed):
        return "sums over tokens"
    for value in node.outputs:
        dims = _dims(value)
        if value.shape is None or (node.op_type == "Reshape" and _width(dims) == _width(reads[0])):
            continue  # a reshape that leaves what one token holds as it is
        if not any(_counts_tokens(d) for d in dims) or any(sign in d for d in dims for sign in "+-"):
            return "takes some tokens or joins others to them"
    return None


def _counts_tokens(dimension: str) -> bool:
    return not dimension.lstrip("-").isdigit() and dimension not in _OTHER_DIMENSIONS


def _width(dims: list[str]) -> int:
    return math.prod(int(d) for d in dims if d.isdigit())


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else -1


def _dims(value: ir.Value | None) -> list[str]:
    return [] if value is None or value.shape is None else [str(getattr(d, "value", d)) for d in value.shape]

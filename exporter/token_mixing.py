"""A check that the tokens of a row meet in cache attention alone: what else mixes them would have to be cached too."""

import itertools
import math

import onnx_ir as ir
from stageline.exporter.skeleton import NoCacheError

_MIXES = frozenset(
    {
        "Conv", "ConvTranspose", "CumSum", "CumProd", "Scan", "Loop", "If", "LSTM", "GRU", "RNN", "AveragePool",
        "MaxPool", "LpPool", "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization", "Attention",
        "Einsum", "ReverseSequence", "Resize", "Trilu", "Det", "DFT",
    }
)  # fmt: skip
_ALONG = frozenset({"Softmax", "LogSoftmax", "Hardmax", "GatherElements", "ScatterElements", "TopK", "Gather"})
_SIZES = frozenset({"Shape", "Size"})
_ONE_FOR_ONE = frozenset(
    {"Sqrt", "Sigmoid", "Reciprocal", "Softmax", "Max", "Min", "Add", "Sub", "Mul", "Div", "Expand", "Cast", "Identity"}
)
_OTHER_DIMENSIONS = frozenset({"batch", "picks"})


def check_apart(graph: ir.Graph) -> None:
    """NoCacheError where a node other than CacheAttention mixes positions.

    Judged by shapes: every free dimension but `batch` and `picks` counts tokens, and a node may not contract it, lose
    it, move along it, or take and join parts of it. Places where logits are wanted (indices with the dimension `picks`)
    are chosen at the end, which is no mixing.
    """
    inferred: dict[ir.Value, list[str]] = {}
    for node in graph:
        reads = [inferred.get(v, _dims(v)) if v is not None else [] for v in node.inputs]
        for value in node.outputs:
            if value.shape is None:  # the optimiser leaves some out
                inferred[value] = _inferred(node, reads)
        if node.op_type == "CacheAttention" or node.op_type in _SIZES:
            continue
        if not any(_counts_tokens(d) for dims in reads for d in dims) or any("picks" in dims for dims in reads):
            continue
        if (reason := _mixing(node, reads)) is not None:
            raise NoCacheError(f"its tokens meet outside attention ({node.op_type} {reason})")


def _mixing(node: ir.Node, reads: list[list[str]]) -> str | None:
    if node.op_type in _MIXES:
        return "over tokens"
    first = reads[0]
    if any(_counts_tokens(first[axis]) for axis in _axes_walked(node, first)):
        return "along the tokens"
    summed = [first[-1], reads[1][-2]] if node.op_type == "MatMul" and first and len(reads[1]) > 1 else []
    if any(_counts_tokens(dimension) for dimension in summed):
        return "sums over tokens"
    for value in node.outputs:
        dims = _dims(value)
        if value.shape is None or (node.op_type == "Reshape" and _width(dims) == _width(first)):
            continue  # a reshape that leaves what one token holds as it is
        if not any(_counts_tokens(d) for d in dims) or any(sign in d for d in dims for sign in "+-/"):
            return "takes some tokens or joins others to them"
    return None


def _axes_walked(node: ir.Node, dims: list[str]) -> list[int]:
    """The axes of the first input, of `dims`, along which an element of the output depends on others than its own."""
    every = list(range(len(dims)))
    match node.op_type:
        case "Gather":
            return [_axis(node, 0)] if dims else []
        case kind if kind in _ALONG:
            return [_axis(node, -1)] if dims else []
        case "LayerNormalization" | "RMSNormalization":
            return every[_axis(node, -1) :]
        case kind if kind.startswith("Reduce"):
            return _integers(node, 1) or every
        case "Pad":
            pads = _integers(node, 1)
            if pads is None:
                return every
            axes = _integers(node, 3) or every
            return [axis for axis, begin, end in zip(axes, pads, pads[len(axes) :], strict=False) if begin or end]
        case "Slice":
            axes, steps = _integers(node, 3) or every, _integers(node, 4) or [1] * len(every)
            return [axis for axis, step in zip(axes, steps, strict=False) if step != 1]
        case _:
            return []


def _integers(node: ir.Node, place: int) -> list[int] | None:
    """The constant that is the node's input at `place`; None where there is none, or it is not constant."""
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(x) for x in tensor.numpy().ravel()]


def _inferred(node: ir.Node, reads: list[list[str]]) -> list[str]:
    """The dimensions of the node's output, as far as they are needed here; none where unknown."""
    match node.op_type:
        case "Transpose" if reads[0]:
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(reads[0]))[::-1]
            return [reads[0][axis] for axis in order]
        case "MatMul" if len(reads[0]) > 1 and len(reads[1]) > 1:
            return [*reads[0][:-1], reads[1][-1]]
        case "Unsqueeze" if reads[0] and (axes := _integers(node, 1)) is not None:
            places, rest = {axis % (len(reads[0]) + len(axes)) for axis in axes}, iter(reads[0])
            return ["1" if place in places else next(rest) for place in range(len(reads[0]) + len(axes))]
        case kind if kind in _ONE_FOR_ONE:
            from_the_end = itertools.zip_longest(*(dims[::-1] for dims in reads), fillvalue="1")
            return [next((d for d in sizes if d != "1"), "1") for sizes in from_the_end][::-1]
        case _:
            return []


def _counts_tokens(dimension: str) -> bool:
    return not dimension.lstrip("-").isdigit() and dimension not in _OTHER_DIMENSIONS


def _width(dims: list[str]) -> int:
    return math.prod(int(d) for d in dims if d.isdigit())


def _axis(node: ir.Node, default: int) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else default


def _dims(value: ir.Value | None) -> list[str]:
    return [] if value is None or value.shape is None else [str(getattr(d, "value", d)) for d in value.shape]

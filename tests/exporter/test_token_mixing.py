"""Every way in which tokens may meet outside attention is found, and what keeps them apart is let pass."""

import onnx.parser
import onnx_ir as ir
import pytest
from stageline.exporter.skeleton import NoCacheError
from stageline.exporter.token_mixing import check_apart

HIDDEN = "float[batch, length, 8] x"
SAME = "float[batch, length, 8] y"


def graph(inputs: str, outputs: str, constants: str, body: str) -> ir.Graph:
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({outputs}) {constants} {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text)).graph


MIXING = {
    "convolution": (
        "float[batch, 8, length] x, float[8, 1, 3] w", "float[batch, 8, length] y", "",
        "y = Conv <group = 8, pads = [2, 0]> (x, w)", "Conv over tokens",
    ),
    "running sum": (HIDDEN, SAME, "<int64 axis = {1}>", "y = CumSum(x, axis)", "CumSum over tokens"),
    "scores": (
        "float[batch, length, 8] x, float[batch, 8, length] t", SAME, "",
        "s = MatMul(x, t)  y = MatMul(s, x)", "MatMul sums over tokens",
    ),
    "softmax over tokens": (HIDDEN, SAME, "", "y = Softmax <axis = 1> (x)", "Softmax along the tokens"),
    "mean of a row": (HIDDEN, "float[batch, 1, 8] y", "<int64[1] axis = {1}>", "y = ReduceMean(x, axis)", "ReduceMean"),
    "a sum that leaves the other tokens": (
        "float[batch, length, length, 8] x", SAME, "<int64[1] axis = {2}>",
        "y = ReduceSum <keepdims = 0> (x, axis)", "ReduceSum along the tokens",
    ),
    "the last token": (
        HIDDEN, "float[batch, 1, 8] y", "<int64[1] begin = {-1}, int64[1] end = {9999}, int64[1] axis = {1}>",
        "y = Slice(x, begin, end, axis)", "Slice takes some tokens",
    ),
    "shift by padding": (
        HIDDEN, SAME, "<int64[6] pads = {0, 1, 0, 0, -1, 0}>", "y = Pad(x, pads)", "Pad along the tokens",
    ),
    "shift by looking up": (
        "float[batch, length, 8] x, int64[length] before", SAME, "", "y = Gather <axis = 1> (x, before)",
        "Gather along the tokens",
    ),
    "back to front": (
        HIDDEN, SAME, "<int64[1] begin = {-1}, int64[1] end = {-9999}, int64[1] axis = {1}, int64[1] step = {-1}>",
        "y = Slice(x, begin, end, axis, step)", "Slice along the tokens",
    ),
    "a norm over tokens": (
        "float[batch, 8, length] x, float[8] w", "float[batch, 8, length] y", "", "y = InstanceNormalization(x, w, w)",
        "InstanceNormalization over tokens",
    ),
    "a row as one vector": (
        HIDDEN, "float[batch, 4] y", "<int64[2] shape = {0, 4}>", "y = Reshape(x, shape)", "Reshape takes some tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_tokens_that_meet_are_found(name: str) -> None:
    inputs, outputs, constants, body, message = MIXING[name]
    given = graph(inputs, outputs, constants, body)
    for node in given:  # the shapes that a trace has, except the last node's
        for value in node.outputs:
            if value.shape is None:
                value.shape = ir.Shape(["batch", "length", "length"])
    with pytest.raises(NoCacheError, match=rf"^its tokens meet outside attention \({message}"):
        check_apart(given)


def test_values_whose_shape_the_optimiser_left_out_are_followed() -> None:
    given = graph(
        "float[batch, length, 8] x, float[8, 8] w",
        SAME,
        "",
        "t = Transpose <perm = [1, 0]> (w)  q = MatMul(x, t)  k = Transpose <perm = [0, 2, 1]> (x) "
        "s = MatMul(q, k)  p = Softmax(s)  y = MatMul(p, x)",
    )
    with pytest.raises(NoCacheError, match="Softmax along the tokens"):
        check_apart(given)


def test_tokens_side_by_side_are_found() -> None:
    given = graph(HIDDEN, "float[batch, half, 16] y", "<int64[3] shape = {0, -1, 16}>", "y = Reshape(x, shape)")
    given.outputs[0].shape = ir.Shape(["batch", "(length//2)", 16])  # as torch writes it
    with pytest.raises(NoCacheError, match="Reshape takes some tokens or joins others"):
        check_apart(given)


APART = {
    "a layer": (
        "float[batch, length, 8] x, float[8, 8] w, float[8] b", SAME, "<int64[1] last = {-1}>",
        "m = ReduceMean(x, last)  c = Sub(x, m)  n = LayerNormalization <axis = -1> (c, b)  h = MatMul(n, w) "
        "s = Sigmoid(h)  g = Mul(h, s)  a = Softmax(g)  y = Add(a, x)",
    ),
    "heads": (
        HIDDEN, "float[batch, 2, length, 4] y", "<int64[4] shape = {0, 0, 2, 4}>",
        "r = Reshape(x, shape)  y = Transpose <perm = [0, 2, 1, 3]> (r)",
    ),
    "half of what a token holds": (
        HIDDEN, "float[batch, length, 4] y", "<int64[1] begin = {0}, int64[1] end = {4}, int64[1] axis = {2}>",
        "y = Slice(x, begin, end, axis)",
    ),
    "wider by padding": (
        HIDDEN, "float[batch, length, 10] y", "<int64[6] pads = {0, 0, 0, 0, 0, 2}>", "y = Pad(x, pads)",
    ),
    "embedding": ("int64[batch, length] ids, float[99, 8] w", SAME, "", "y = Gather(w, ids)"),
    "places for logits": (
        "float[batch, length, 8] x, int64[batch, picks, 8] at", "float[batch, picks, 8] y", "",
        "y = GatherElements <axis = 1> (x, at)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_keeps_tokens_apart_passes(name: str) -> None:
    check_apart(graph(*APART[name]))

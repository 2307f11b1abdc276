"""Norms and rotary embeddings that are spelled out become one operator each."""

import numpy as np
import onnx.parser
import onnx.reference
import onnx_ir as ir
from stageline.exporter.fuse import fuse_norms, fuse_rotary


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 23]> ' + text))


def operators(fused: ir.Model) -> list[str]:
    return [node.op_type for node in fused.graph if node.op_type != "Constant"]


def test_a_root_mean_square_is_one_operator_and_computes_the_same() -> None:
    given = model(
        "g (float[batch, length, 8] x, float[8] w) => (float[batch, length, 8] y) "
        "<float eps = {0.00001}, float two = {2.0}, int64[1] last = {-1}> "
        "{ p = Pow(x, two)  m = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (p, last)  a = Add(m, eps) "
        "s = Sqrt(a)  i = Reciprocal(s)  n = Mul(x, i)  y = Mul(n, w) }"
    )
    x, w = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32), np.arange(8, dtype=np.float32)
    (before,) = onnx.reference.ReferenceEvaluator(ir.to_proto(given)).run(None, {"x": x, "w": w})
    fuse_norms(given)
    assert operators(given) == ["RMSNormalization"]
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(before, expected, rtol=1e-5)
    (after,) = onnx.reference.ReferenceEvaluator(ir.to_proto(given)).run(None, {"x": x, "w": w})
    np.testing.assert_allclose(after, expected, rtol=1e-5)


def test_what_is_no_norm_stays() -> None:
    given = model("g (float[batch, 8] x) => (float[batch, 8] y) { s = Sqrt(x)  y = Mul(x, s) }")
    fuse_norms(given)
    fuse_rotary(given)
    assert operators(given) == ["Sqrt", "Mul"]

"""Weights of 4 and 8 bits on graphs of one product: which are quantised, and how far the values may be off."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.errors import EngineError
from stageline.runtime.engines import Array, WeightDtype
from stageline.runtime.engines.lowering import nbits
from stageline.runtime.engines.lowering.nbits import (
    BLOCK,
    MIN_WEIGHTS,
    bytes_per_weight,
    multiplied_weight,
    quantise,
    to_nbits,
)


def unpacked(values: Array, bits: int, count: int) -> Array:
    """Packed along the last axis -> one integer each, the first `count` of them."""
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    return values[..., :count].astype(np.float32)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 3 * BLOCK),
    bits=st.sampled_from([4, 8]),
)
def test_a_weight_is_off_by_at_most_a_step_of_its_block(seed: int, rows: int, columns: int, bits: int) -> None:
    weight = np.random.default_rng(seed).normal(0, 1, (rows, columns)).astype(np.float32)
    values, scales, zeros = quantise(weight, bits)
    blocks = -(-columns // BLOCK)
    assert values.shape == (rows, blocks, BLOCK * bits // 8)
    steps = unpacked(values, bits, BLOCK) - unpacked(zeros, bits, blocks)[:, :, None]
    restored = (steps * scales[:, :, None]).reshape(rows, -1)[:, :columns]
    limit = np.repeat(scales, BLOCK, axis=1)[:, :columns]
    assert (np.abs(restored - weight) <= limit * 1.001).all()  # half for rounding, half for the zero point at the ends


def test_zero_stays_zero() -> None:
    """Padding and pruned weights must not turn into noise."""
    weight = np.array([[0.0, 5.0, 0.0, 9.0]], np.float32)
    values, scales, zeros = quantise(weight, 8)
    restored = (values[:, 0, :4].astype(np.float32) - zeros[:, :1]) * scales
    assert restored[0, [0, 2]].tolist() == [0.0, 0.0]
    assert quantise(np.zeros((1, 3), np.float32), 4)[1].tolist() == [[1.0]]  # no scale is 0


def model(shape: tuple[int, int], op: str = "MatMul", transposed: bool = False, **attributes: float) -> ir.Model:
    """x @ w, with w [K, N], or [N, K] behind a Transpose."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", shape[0]]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = shape[::-1] if transposed else shape
    data = ir.tensor(np.random.default_rng(1).normal(0, 0.1, stored).astype(np.float32), name="w")
    weight = ir.Value(name="w", shape=ir.Shape(stored), type=ir.TensorType(ir.DataType.FLOAT), const_value=data)
    nodes = [ir.node("Transpose", [weight], {"perm": [1, 0]})] if transposed else []
    product = ir.node(op, [x, nodes[0].outputs[0] if nodes else weight], attributes or None, name="product")
    product.outputs[0].name = "y"
    graph = ir.Graph([x], [product.outputs[0]], nodes=[*nodes, product], initializers=[weight], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def ops(made: ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_large_product_is_lowered_and_its_weight_is_gone(dtype: WeightDtype, transposed: bool) -> None:
    made = to_nbits(model((128, 256), transposed=transposed), dtype)
    assert ops(made) == ["MatMulNBits"]
    (node,) = made.graph
    assert (node.attributes["K"].as_int(), node.attributes["N"].as_int()) == (128, 256)
    assert [value.name for value in made.graph.outputs] == ["y"]
    assert "w" not in made.graph.initializers
    held = sum(value.const_value.nbytes for value in made.graph.initializers.values() if value.const_value is not None)
    assert held == 128 * 256 * bytes_per_weight(dtype)


def test_both_layouts_hold_the_same_values() -> None:
    plain, turned = (to_nbits(model((128, 256), transposed=flag), "int8") for flag in (False, True))
    shapes = [[v.shape for v in made.graph.initializers.values()] for made in (plain, turned)]
    assert shapes[0] == shapes[1]


def test_small_products_and_other_operators_are_left_alone() -> None:
    assert MIN_WEIGHTS == 128 * 128
    assert ops(to_nbits(model((128, 127)), "int8")) == ["MatMul"]
    assert ops(to_nbits(model((128, 256), "Gemm", alpha=0.5), "int8")) == ["Gemm"]
    assert ops(to_nbits(model((128, 256), "Gemm", alpha=1.0), "int8")) == ["MatMulNBits"]


def test_a_product_of_activations_has_no_weight() -> None:
    made = model((4, 4))
    product = made.graph[0]
    product.replace_input_with(1, product.inputs[0])  # type: ignore[arg-type]
    assert multiplied_weight(product) is None


def test_more_weights_than_a_graph_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbits, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(EngineError, match=r"the int4 weights of one stage .*; cut the bundle into more stages"):
        to_nbits(model((128, 256)), "int4")

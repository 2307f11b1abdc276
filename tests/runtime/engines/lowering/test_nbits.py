"""Weights of 4 and 8 bits on graphs of one product: which are quantised, and what it computes."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from stageline.models.errors import EngineError
from stageline.runtime.engines import WeightDtype
from stageline.runtime.engines.lowering import nbits
from stageline.runtime.engines.lowering.nbits import (
    MIN_WEIGHTS,
    check_graph_size,
    multiplied_weight,
    quantised_bytes,
    to_nbits,
)


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
    assert ops(made)[-1] == "MatMulNBits"
    node = made.graph[-1]
    assert node.attributes["N"].as_int() == 256
    assert [value.name for value in made.graph.outputs] == ["y"]
    assert "w" not in made.graph.initializers
    held = {name: value.const_value for name, value in made.graph.initializers.items() if name.startswith("w.")}
    assert sum(tensor.nbytes for tensor in held.values() if tensor is not None) == quantised_bytes(256, 128, dtype)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 1e-2), ("int4", 0.1)])
def test_it_computes_nearly_the_same(dtype: WeightDtype, most: float) -> None:
    x = np.random.default_rng(2).normal(0, 1, (3, 128)).astype(np.float32)
    plain, made = model((128, 256)), to_nbits(model((128, 256)), dtype)
    want, got = (
        ort.InferenceSession(ir.to_proto(one).SerializeToString()).run(None, {"x": x})[0] for one in (plain, made)
    )
    assert 0 < np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < most


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_activations_of_a_rank_that_the_graph_does_not_say(dtype: WeightDtype) -> None:
    made = model((128, 256))
    product = made.graph[0]
    same = ir.node("Identity", [product.inputs[0]])
    made.graph.insert_before(product, same)
    product.replace_input_with(0, same.outputs[0])
    want, got = (
        ort.InferenceSession(ir.to_proto(one).SerializeToString())
        for one in (to_nbits(model((128, 256)), dtype), to_nbits(made, dtype))
    )
    x = np.random.default_rng(2).normal(0, 1, (3, 128)).astype(np.float32)
    np.testing.assert_array_equal(got.run(None, {"x": x})[0], want.run(None, {"x": x})[0])


def test_products_of_one_value_share_the_sums_of_its_blocks() -> None:
    made = model((128, 256))
    product = made.graph[0]
    other = ir.Value(name="v", shape=ir.Shape((128, 256)), type=ir.TensorType(ir.DataType.FLOAT))
    other.const_value = ir.tensor(np.random.default_rng(3).normal(0, 1, (128, 256)).astype(np.float32), name="v")
    made.graph.register_initializer(other)
    second = ir.node("MatMul", [product.inputs[0], other], name="second")
    second.outputs[0].name, second.outputs[0].shape = "z", product.outputs[0].shape
    made.graph.append(second)
    made.graph.outputs.append(second.outputs[0])
    found = ops(to_nbits(made, "int8"))
    assert (found.count("ReduceSum"), found.count("MatMulNBits")) == (1, 2)


def test_both_layouts_hold_the_same_values() -> None:
    plain, turned = (to_nbits(model((128, 256), transposed=flag), "int8") for flag in (False, True))
    shapes = [[v.shape for v in made.graph.initializers.values()] for made in (plain, turned)]
    assert shapes[0] == shapes[1]


def test_small_products_and_other_operators_are_left_alone() -> None:
    assert MIN_WEIGHTS == 128 * 128
    assert ops(to_nbits(model((128, 127)), "int8")) == ["MatMul"]
    assert ops(to_nbits(model((128, 256), "Gemm", alpha=0.5), "int8")) == ["Gemm"]
    assert ops(to_nbits(model((128, 256), "Gemm", alpha=1.0), "int8"))[-1:] == ["MatMulNBits"]


def test_a_product_of_activations_has_no_weight() -> None:
    made = model((4, 4))
    product = made.graph[0]
    product.replace_input_with(1, product.inputs[0])  # type: ignore[arg-type]
    assert multiplied_weight(product) is None


def test_more_weights_than_a_graph_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbits, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(EngineError, match=r"the int4 weights of one stage .*; cut the bundle into more stages"):
        check_graph_size(to_nbits(model((128, 256)), "int4"), "int4")

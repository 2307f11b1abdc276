"""Weights beside a session's graph: the session computes with them as with weights in the graph."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from stageline.runtime.engines.lowering.session_weights import give_weights, put_back, take_weights

RNG = np.random.default_rng(0)


def model(weight: ir.TensorProtocol) -> ir.Model:
    """y = Cast(w) x + small, with float32 x [64, n]."""
    x = ir.Value(name="x", shape=ir.Shape([64, "n"]), type=ir.TensorType(ir.DataType.FLOAT))
    w, small = (
        ir.Value(name=t.name, shape=ir.Shape(t.shape), type=ir.TensorType(t.dtype), const_value=t)
        for t in (weight, ir.tensor(np.float32([[1.5]]), name="small"))
    )
    cast = ir.node("Cast", [w], {"to": ir.DataType.FLOAT})
    product = ir.node("MatMul", [cast.outputs[0], x])
    total = ir.node("Add", [product.outputs[0], small])
    total.outputs[0].name = "y"
    total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], total.outputs, nodes=[cast, product, total], initializers=[w, small], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(proto: bytes, weights: dict[str, ir.TensorProtocol], x: Any) -> Any:
    options = ort.SessionOptions()
    kept = give_weights(options, weights)
    result = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    del kept
    return result


@pytest.mark.parametrize("dtype", ["BFLOAT16", "FLOAT", "FLOAT16", "UINT8"])
def test_a_session_computes_with_weights_beside_its_graph(dtype: str) -> None:
    values = (RNG.random((32, 64)) * 100).astype(ir.DataType[dtype].numpy())
    made = model(ir.tensor(values, name="w"))
    inside = ir.to_proto(made).SerializeToString()
    x = RNG.random((64, 3), np.float32)
    weights = take_weights(made)
    graph = ir.to_proto(made).SerializeToString()
    assert list(weights) == ["w"]
    assert len(graph) < 1024
    want = values.astype(np.float32) @ x + 1.5
    np.testing.assert_allclose(run(graph, weights, x), want, rtol=1e-5)
    assert np.array_equal(run(graph, weights, x), run(inside, {}, x))
    assert np.array_equal(run(put_back(graph, weights), {}, x), run(inside, {}, x))


def test_a_weight_that_is_unpacked_is_read_when_the_session_is_opened() -> None:
    read = []

    def values() -> ir.Tensor:
        read.append(1)
        return ir.tensor(np.ones((32, 64), np.float32), name="w")

    made = model(ir.LazyTensor(values, ir.DataType.FLOAT, ir.Shape([32, 64]), name="w", cache=False))
    weights = take_weights(made)
    graph = ir.to_proto(made).SerializeToString()
    assert not read
    assert np.array_equal(run(graph, weights, np.ones((64, 2), np.float32)), np.full((32, 2), 65.5))
    assert read


def test_small_weights_and_those_of_a_few_bits_stay_in_the_graph() -> None:
    packed = onnx.helper.make_tensor("w", onnx.TensorProto.UINT4, [64, 64], RNG.integers(0, 16, 64 * 64).tolist())
    assert take_weights(model(ir.from_proto(packed))) == {}
    assert take_weights(model(ir.tensor(np.ones((2, 64), np.float32), name="w"))) == {}

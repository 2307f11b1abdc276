"""Lowering half-precision graphs, against NumPy."""

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from stageline.runtime.engines import Array
from stageline.runtime.engines.lowering.float32 import HALVES, has_types, to_float32

HALF = {"bfloat16": (16, ml_dtypes.bfloat16), "float16": (10, np.float16)}


def parsed(text: str, **initializers: Array) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> graph {text}')
    model = ir.from_proto(proto)
    for name, array in initializers.items():
        value = next(v for node in model.graph.all_nodes() for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype = value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def outputs(model: ir.Model, **inputs: Array) -> list[Array]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, inputs)
    return found


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_half_precision_graph_computes_in_float32(half: str) -> None:
    code, dtype = HALF[half]
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(dtype)
    model = parsed(
        f"""(float[n, 4] x) => ({half}[n, 4] y, {half}[4] filled)
        {{ narrow = Cast<to = {code}>(x)  product = MatMul(narrow, w)  shape = Constant<value_ints = [4]>()
           filled = ConstantOfShape<value = {half}[1] {{0}}>(shape)  like = CastLike(x, filled)
           y = Add(product, like) }}""",
        w=weight,
    )
    assert has_types(model)
    lowered = to_float32(model)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    y, filled = outputs(lowered, x=x)
    assert y.dtype == filled.dtype == np.float32
    np.testing.assert_allclose(y, x @ weight.astype(np.float32) + x, rtol=1e-6)
    assert not [v for node in lowered.graph.all_nodes() for v in node.outputs if v.dtype in HALVES]
    assert lowered.graph.initializers["w.half"].dtype in HALVES  # as it lies on disk


def test_branches_are_lowered_too() -> None:
    model = parsed(
        """(bool c, float16[2] x) => (float16[2] y)
        { y = If (c) <
            then_branch = yes () => (float16[2] a) { one = Constant<value = float16 {15360}>()  a = Add(x, one) },
            else_branch = no () => (float16[2] b) { b = Mul(x, w) }
        > }""",
        w=np.array([3, 4], np.float16),
    )
    lowered = to_float32(model)
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(outputs(lowered, c=np.array(True), x=x)[0], [2, 3])
    np.testing.assert_array_equal(outputs(lowered, c=np.array(False), x=x)[0], [3, 8])


def test_a_weight_that_is_an_output_keeps_its_name() -> None:
    model = parsed("(float16[2] x) => (float16[2] y) { y = Add(x, w) }", w=np.array([1, 2], np.float16))
    model.graph.outputs.append(model.graph.initializers["w"])
    _, w = outputs(to_float32(model), x=np.zeros(2, np.float32))
    np.testing.assert_array_equal(w, np.array([1, 2], np.float32))


def test_a_float32_graph_has_no_halves() -> None:
    assert not has_types(parsed("(float[2] x) => (float[2] y) { y = Add(x, w) }", w=np.ones(2, np.float32)))

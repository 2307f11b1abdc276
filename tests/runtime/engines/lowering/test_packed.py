"""Packed weights in the graphs of each engine, against the exact weight."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from packed_stage import gptq, packed_stage, q4_1
from stageline.models.packing import dequantised
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines import StageFile, WeightDtype, engine_factory
from stageline.runtime.engines.lowering.onnxruntime import lowered
from stageline.runtime.engines.lowering.packed import Packed, open_stage
from stageline.runtime.engines.tensorrt.lower import lower

RNG = np.random.default_rng
MADE = {
    "Q4_1": lambda: q4_1(RNG(0), 96, 128),
    "gptq": lambda: gptq(RNG(1), 96, 128, 64, act_order=False),
    "gptq in another order": lambda: gptq(RNG(2), 96, 128, 32, act_order=True),
}
KINDS = pytest.mark.parametrize("kind", MADE)


def run(
    stage: StageFile, inputs: dict[str, Any], engine: str = "onnxruntime", quantise: WeightDtype | None = None
) -> Any:
    opened = engine_factory(engine)(stage, CpuDevice((0,)), None, quantise)
    try:
        return np.asarray(opened.run(inputs, ["y"])["y"])
    finally:
        opened.close()


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_weight(tmp_path: Path, kind: str, dtype: str) -> None:
    packing, arrays = MADE[kind]()
    stage = packed_stage(tmp_path, packing, arrays, "MatMul", dtype)
    x = RNG(3).normal(0, 1, (2, 5, 128)).astype(np.float32)
    want = x @ dequantised(packing, arrays).T
    scale = np.abs(want).max()
    np.testing.assert_allclose(run(stage, {"x": x}, quantise="float32"), want, atol=1e-5 * scale)
    np.testing.assert_allclose(run(stage, {"x": x}, "openvino"), want, atol=1e-4 * scale)
    # Activations of 8 bits, and what is lost of offsets.
    np.testing.assert_allclose(run(stage, {"x": x}), want, atol=1e-2 * scale)
    assert not np.allclose(run(stage, {"x": x}), want, atol=1e-5 * scale)


@KINDS
@pytest.mark.parametrize("quantise", [None, "float32"])
def test_rows_that_are_looked_up_are_exact(tmp_path: Path, kind: str, quantise: WeightDtype | None) -> None:
    packing, arrays = MADE[kind]()
    stage = packed_stage(tmp_path, packing, arrays, "Gather")
    ids = RNG(4).integers(0, 96, (2, 7))
    want = dequantised(packing, arrays)[ids]
    np.testing.assert_allclose(run(stage, {"ids": ids}, quantise=quantise), want, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(run(stage, {"ids": ids}, "openvino", quantise), want, rtol=2e-6, atol=1e-6)


def test_the_graph_for_processors_holds_four_bits_a_value(tmp_path: Path) -> None:
    stage = packed_stage(tmp_path, *q4_1(RNG(0), 256, 512), "MatMul")
    made = lowered(stage, ir.DataType.FLOAT, None)
    ops = [node.op_type for node in onnx.ModelProto.FromString(made.proto).graph.node]
    assert ops == ["Reshape", "ReduceSum", "Pad", "Concat", "MatMulNBits"]
    assert sum(weight.nbytes for weight in made.weights.values()) < 0.8 * 256 * 512
    exact = lowered(stage, ir.DataType.FLOAT, "float32")
    assert sum(weight.nbytes for weight in exact.weights.values()) == 4 * 256 * 512
    assert len(made.proto) < 4096 > len(exact.proto)


def test_a_packed_weight_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    packing, arrays = gptq(RNG(1), 16, 64, 32, act_order=False)
    model = open_stage(packed_stage(tmp_path, packing, arrays, "MatMul", "bfloat16"))
    (weight,) = model.graph.initializers.values()
    assert isinstance(weight.const_value, Packed)
    assert (weight.name, weight.dtype) == ("w", ir.DataType.FLOAT)
    assert np.array_equal(weight.const_value.numpy(), dequantised(packing, arrays))
    assert [node.op_type for node in model.graph] == ["Cast", "Transpose", "MatMul"]
    assert model.graph.opset_imports == {"": 20}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tensorrt_gets_weights_of_its_own_type(tmp_path: Path, precision: Any) -> None:
    packing, arrays = q4_1(RNG(0), 32, 64)
    made = lower(packed_stage(tmp_path, packing, arrays, "MatMul"), precision, 8, stripped=False)
    (weight,) = made.weights.values()
    np.testing.assert_allclose(
        np.asarray(weight.read(), np.float32), dequantised(packing, arrays), rtol=1e-3, atol=1e-4
    )

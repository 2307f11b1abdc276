"""Half-precision graphs keep the constants of float32: what computes them in float32 gives what torch gives in it."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from stageline.exporter import skeleton
from stageline.exporter.exact_constants import take_buffers
from stageline.exporter.trace import trace
from stageline.runtime.engines.lowering.float32 import HALVES, to_float32


class Numbers(torch.nn.Module):
    """A layer with the kinds of constants that models have; x: [batch, length, 4]."""

    output_names = ("y",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs = (skeleton.Input("x", dtype, ("batch", "length", 4)),)
        self.model = torch.nn.Identity()
        self.register_buffer("scale", torch.tensor(1 / 3, dtype=dtype), persistent=False)
        frequencies = 10000 ** -(torch.arange(4) / torch.tensor(4.0, dtype=dtype))
        self.register_buffer("angles", torch.arange(9)[:, None].float() * frequencies, persistent=False)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        (x,) = tensors
        y = (x + 0.044715 * x**3) * 0.7978845608
        y = y * self.scale + torch.tensor(0.1, dtype=x.dtype)
        y = torch.where(y > 0.3, y / 0.7, 0.9)
        y = y + torch.arange(0.5, 4, dtype=x.dtype) / 7  # known when the model is exported
        y = y * torch.full((4,), 0.3, dtype=x.dtype) + torch.full_like(y, 0.01)
        y = y + self.angles[torch.arange(x.shape[1])].sin().to(x.dtype)
        return (y.clamp(-1.1, 5.3) * (torch.tensor(48.0).sqrt().to(x.dtype)),)


def traced(dtype: torch.dtype) -> ir.Model:
    layer: Any = Numbers(dtype).eval()
    exact = take_buffers(layer, Numbers(torch.float32))
    samples = (torch.ones(layer.inputs[0].sample_shape(), dtype=dtype),)
    return trace(layer, samples, [], [], frozenset(), exact).model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_graph_computes_with_the_numbers_of_float32(dtype: torch.dtype) -> None:
    model = traced(dtype)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float16
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(numpy_dtype)
    wide = x.astype(np.float32)
    (want,) = Numbers(torch.float32)(torch.from_numpy(wide))
    (half,) = ReferenceEvaluator(proto).run(None, {"x": x})
    assert half.dtype == numpy_dtype
    np.testing.assert_allclose(half.astype(np.float32), want, rtol=0.05, atol=0.05)
    session = ort.InferenceSession(
        ir.to_proto(to_float32(model)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, {"x": wide})[0], want, rtol=1e-5)


def test_a_number_that_half_precision_holds_needs_no_cast() -> None:
    halves = {
        float(v.const_value.numpy())
        for v in traced(torch.bfloat16).graph.initializers.values()
        if v.dtype in HALVES and v.const_value is not None and v.const_value.size == 1
    }
    assert 3.0 in halves
    assert not [number for number in halves if number != np.float32(number).astype(ml_dtypes.bfloat16)]

"""Weights as a lowered graph reads them: converted, and refused where a value would become infinite."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import EngineError
from stageline.runtime.engines import Array
from stageline.runtime.engines.lowering.weights import QuantisedWeight, Scales, Weight

HALF, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_ROUNDS_UP = 65520  # from here on, float16 is infinite (IEEE 754, round to nearest, ties to even)


def on_disk(array: Array, folder: Path) -> ir.ExternalTensor:
    (folder / "w").write_bytes(array.tobytes())
    dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    return ir.ExternalTensor("w", 0, array.nbytes, dtype, shape=shape, name="layer.weight", base_dir=folder)


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), bfloat16=st.booleans())
def test_a_value_is_refused_if_float16_rounds_it_to_infinity(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], bfloat16: bool
) -> None:
    array = np.array(values, ml_dtypes.bfloat16 if bfloat16 else np.float32)
    exact = array.astype(np.float64)
    lost = np.abs(exact) >= _ROUNDS_UP
    weight = Weight(on_disk(array, tmp_path_factory.mktemp("w")), HALF)
    if not lost.any():
        assert np.array_equal(weight.read(), exact.astype(np.float16))
        return
    with pytest.raises(EngineError) as caught:
        weight.read()
    count = "1 value" if lost.sum() == 1 else f"{lost.sum()} values"
    largest = f"{np.abs(exact).max():g}"
    assert str(caught.value) == (
        f"tensor 'layer.weight' has {count} beyond the range of float16 (65504), the largest {largest}; "
        "choose --precision bf16"
    )


def test_what_is_infinite_on_disk_stays_so_and_bfloat16_holds_what_float16_cannot(tmp_path: Path) -> None:
    array = np.array([np.inf, -np.inf, 1], np.float32)
    assert np.array_equal(Weight(on_disk(array, tmp_path), HALF).read(), array)
    array = np.array([1e5, -3e38], np.float32)
    assert np.isfinite(Weight(on_disk(array, tmp_path), BFLOAT16).read().astype(np.float32)).all()
    with pytest.raises(EngineError, match=re.escape("beyond the range of bfloat16 (3.38953e+38), the largest 3.4e+38")):
        Weight(on_disk(np.array([3.4e38], np.float32), tmp_path), BFLOAT16).read()


def test_a_quantised_matrix_is_refused_if_its_product_with_a_scale_would_be_infinite(tmp_path: Path) -> None:
    array = np.ones((4, 64), ml_dtypes.bfloat16)
    array[1, 2] = 1e5
    tensor = on_disk(array, tmp_path)
    weight = QuantisedWeight(tensor, ir.DataType.INT8, 1, 64, HALF)
    with pytest.raises(EngineError, match=r"'layer.weight' has 1 value beyond the range of float16"):
        Scales(tensor, HALF, weight).read()
    wide = QuantisedWeight(tensor, ir.DataType.INT8, 1, 64, BFLOAT16)
    scales = Scales(tensor, BFLOAT16, wide).read().astype(np.float32)
    values = wide.read().astype(np.float32) * scales[:, None]
    assert np.abs(values - array.astype(np.float32)).max() <= 0.5 * scales.max() * 1.01

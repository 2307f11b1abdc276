"""8-bit floats with scales, against transformers' own dequantiser."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.tensors import Packing

ROWS, COLUMNS = 64, 96


def packed(*block: int) -> Packing:
    return Packing("fp8", {"block_rows": block[0], "block_columns": block[1]}, (ROWS, COLUMNS), "bfloat16")


@pytest.mark.parametrize("block", [(32, 32), (1, -1), (-1, -1), (16, 96)])
@pytest.mark.parametrize("scale_type", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_values_are_those_of_transformers(block: tuple[int, int], scale_type: str) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 127, (ROWS, COLUMNS), dtype=np.uint8) | rng.integers(0, 2, (ROWS, COLUMNS), np.uint8) << 7
    shape = tuple(1 if size == -1 else side // size for side, size in zip((ROWS, COLUMNS), block, strict=True))
    scales = np.exp2(rng.integers(-9, -5, shape)) * (1 if "e8m0" in scale_type else rng.uniform(0.5, 1, shape))
    scales = scales.astype(np.dtype(getattr(ml_dtypes, scale_type, scale_type)))
    arrays = {"weight": numbers.view(ml_dtypes.float8_e4m3fn), "scale": scales}
    packing.check(packed(*block), {role: (array.dtype.name, array.shape) for role, array in arrays.items()})
    expected = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(numbers).view(torch.float8_e4m3fn),
        torch.from_numpy(scales.astype(np.float32)),
        output_dtype=torch.float32,
    )
    np.testing.assert_array_equal(packing.dequantised(packed(*block), arrays), expected.numpy())
    assert packing.groups(packed(*block), arrays) is None


@pytest.mark.parametrize(
    ("block", "weight", "scale", "said"),
    [
        ((32, 32), ("float8_e4m3fn", (64, 95)), ("float32", (2, 3)), "its weight is float8_e4m3fn [64, 95]"),
        ((32, 32), ("int8", (64, 96)), ("float32", (2, 3)), "its weight is int8 [64, 96]"),
        ((32, 32), ("float8_e4m3fn", (64, 96)), ("float32", (3, 3)), "its scale is float32 [3, 3]"),
        ((32, 32), ("float8_e4m3fn", (64, 96)), ("int32", (2, 3)), "its scale is int32 [2, 3]"),
        ((1, -1), ("float8_e4m3fn", (64, 96)), ("float32", (96,)), "its scale is float32 [96]"),
        ((0, -1), ("float8_e4m3fn", (64, 96)), ("float32", (64,)), "it has the block_rows 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(block: tuple[int, int], weight: Any, scale: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        packing.check(packed(*block), {"weight": weight, "scale": scale})
    assert str(error.value).startswith(said)

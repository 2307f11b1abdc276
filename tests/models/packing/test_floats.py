"""Narrow floats, each of their values, against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
from stageline.models.packing import scaled
from stageline.models.packing.floats import E2M1, widen
from stageline.models.tensors import Packing


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_every_8_bit_float(name: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    np.testing.assert_array_equal(widen(every), every.astype(np.float32))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_16_bit_float(name: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.dtype(getattr(ml_dtypes, name, name)))
    np.testing.assert_array_equal(widen(every), every.astype(np.float32))


def test_every_4_bit_float() -> None:
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(E2M1, every.astype(np.float32))


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (2, 3), (1, 4), (3, 5), (100, 100)])
def test_blocks_at_the_edges_are_short(block: tuple[int, int]) -> None:
    rows, columns = 7, 13
    packed = Packing("fp8", {"block_rows": block[0], "block_columns": block[1]}, (rows, columns), "float32")
    grid = scaled.grid(packed)
    scales = np.arange(1, grid[0] * grid[1] + 1, dtype=np.float32).reshape(grid)
    numbers = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    expected = np.empty_like(numbers)
    for n in range(rows):
        for k in range(columns):
            at = [0 if size == -1 else place // size for size, place in zip(block, (n, k), strict=True)]
            expected[n, k] = numbers[n, k] * scales[at[0], at[1]]
    np.testing.assert_array_equal(scaled.weight(lambda rows: numbers[rows], *scaled.by_row(packed, scales)), expected)

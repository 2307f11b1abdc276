"""Matrices rounded to whole numbers: what is stored is what another reader unpacks, and no further away than half a
step."""

import ml_dtypes
import numpy as np
import pytest
from stageline.exporter.quantise.nearest import ROLES, Bits, Scheme
from stageline.models import packing


def drawn(rows: int, columns: int) -> np.ndarray:
    """bfloat16, with a group of zeros, one of one sign, and rows of very different sizes."""
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((rows, columns)) * np.exp(4 * rng.standard_normal((rows, 1)))
    weight[0, :32] = 0
    weight[1] = np.abs(weight[1])
    return weight.astype(ml_dtypes.bfloat16)


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first numbers of each row of words, one by one."""
    per_word = 32 // bits
    each = [(words.astype(np.int64) & 0xFFFFFFFF) >> bits * place & 2**bits - 1 for place in range(per_word)]
    return np.stack(each, axis=-1).reshape(len(words), -1)[:, :count]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 64, 32), (33, 128, 64), (3, 48, 16), (64, 256, 128)])
def test_the_parts_mean_what_the_layout_says_and_are_near(bits: Bits, rows: int, columns: int, group: int) -> None:
    weight = drawn(rows, columns)
    scheme = Scheme(bits, group)
    parts = scheme.round(weight)
    numbers = unpacked(parts.packed, bits, columns).reshape(rows, -1, group)
    zeros = unpacked(np.ascontiguousarray(parts.zeros.T), bits, rows).T
    steps = parts.scales.astype(np.float64)
    meant = ((numbers - zeros[:, :, None]) * steps[:, :, None]).reshape(rows, columns)
    error = np.abs(meant - weight.astype(np.float64)).reshape(rows, -1, group)
    # a zero point off by half moves the ends of a range by half a step, and rounding there moves as much again
    assert (error <= 1.01 * steps[:, :, None]).all()
    assert (error.mean(axis=2) <= 0.35 * steps + 1e-30).all()
    assert (meant[weight.astype(np.float32) == 0] == 0).all()

    stored = dict(zip(ROLES, parts, strict=True))
    described = {role: (str(part.dtype), part.shape) for role, part in stored.items()}
    made = scheme.packing((rows, columns), "bfloat16")
    packing.check(made, described)
    assert tuple(described.values()) == scheme.parts((rows, columns))
    np.testing.assert_array_equal(packing.dequantised(made, stored), meant.astype(np.float32))
    held = packing.groups(made, stored)
    assert held is not None
    assert held.zeros is not None  # whole: engines take them as they are
    np.testing.assert_array_equal(held.weight(), meant.astype(np.float32))


def test_scales_are_rounded_up_to_bfloat16() -> None:
    weight = np.linspace(-1, 1.7, 64, dtype=np.float32)[None] * np.float32([[1], [1e-30], [3e4]])
    scales = Scheme(8, 64).round(weight).scales.astype(np.float64)[:, 0]
    exact = (weight.max(axis=1).astype(np.float64) - weight.min(axis=1)) / 255
    assert (scales >= exact * (1 - 1e-6)).all()
    assert (scales <= exact * (1 + 2**-7)).all()

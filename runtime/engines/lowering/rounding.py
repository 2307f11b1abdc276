"""Quantise a matrix by rounding to the nearest: whole numbers, a scale and an offset for each group of values."""

import numpy as np
from numpy.typing import NDArray
from stageline.models.packing.base import Groups


def rounded(weight: NDArray[np.float32], bits: int, group: int) -> Groups:
    """weight [N, K] in groups of `group` values of a row, which reach from its smallest to its largest value; a last,
    shorter one from 0 on, if that is beyond them."""
    rows, columns = weight.shape
    count = -(-columns // group)
    padded = np.zeros((rows, count * group), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, count, group)
    offsets = grouped.min(axis=2)
    scales = (grouped.max(axis=2) - offsets) / np.float32(2**bits - 1)
    values = np.rint((grouped - offsets[:, :, None]) / np.where(scales == 0, 1, scales)[:, :, None]).astype(np.uint8)
    return Groups(values.reshape(rows, -1)[:, :columns], bits, group, scales, offsets)

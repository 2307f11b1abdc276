"""Quantise a matrix by rounding to the nearest: whole numbers, a scale and an offset for each group of values."""

import numpy as np
from numpy.typing import NDArray
from stageline.models.packing.base import Groups


def rounded(weight: NDArray[np.float32], bits: int, group: int) -> Groups:
    """weight [N, K] in groups of `group` values of a row, each from its smallest to its largest value. A group that
    holds a zero keeps it, so that what was pruned does not become noise: its zero point is whole. So are all where the
    last group is shorter."""
    rows, columns = weight.shape
    count, top = -(-columns // group), np.float32(2**bits - 1)
    padded = np.zeros((rows, count * group), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, count, group)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    whole = (grouped == 0).any(axis=2) | bool(columns % group)
    low, high = np.where(whole, low.clip(max=0), low), np.where(whole, high.clip(min=0), high)
    scales = (high - low) / top
    steps = np.where(scales == 0, np.float32(1), scales)
    zeros = np.rint(-low / steps)
    offsets = np.where(whole, -zeros * scales, low)
    values = np.rint((grouped - offsets[:, :, None]) / steps[:, :, None]).clip(0, top).astype(np.uint8)
    values = values.reshape(rows, -1)[:, :columns]
    return Groups(values, bits, group, scales, offsets, zeros.astype(np.uint8) if whole.all() else None)

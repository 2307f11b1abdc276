"""A matrix rounded to whole numbers in groups, in the layout pack-quantized of compressed-tensors.

Zero points are whole and ranges hold zero, so that ONNX Runtime's MatMulNBits and OpenVINO compute with these numbers
as they are. Scales are bfloat16, rounded up: no number of a group is beyond the range, and small scales do not vanish.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from stageline.models.tensors import Packing

Bits = Literal[4, 8]
ROLES = ("weight_packed", "weight_zero_point", "weight_scale")
_SLAB = 1 << 21  # values that are rounded at once


class Parts(NamedTuple):
    """The parts of a matrix [N, K] with G groups in a row, in the order of ROLES."""

    packed: NDArray[np.int32]
    """[N, words], each row a stream of numbers, the lowest bits first."""
    zeros: NDArray[np.int32]
    """[words, G], each column a stream of the zero points of the N rows."""
    scales: NDArray[Any]
    """bfloat16 [N, G]"""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is rounded: `bits` a number, and a scale and a zero point for each `group` columns of a row."""

    bits: Bits
    group: int

    def packing(self, shape: tuple[int, int], dtype: str) -> Packing:
        """What the bundle's manifest says of a matrix of this shape that stands for `dtype`."""
        settings: dict[str, int | str] = {
            "format": "pack-quantized",
            "bits": self.bits,
            "block_rows": 1,
            "block_columns": self.group,
        }
        return Packing("compressed-tensors", settings, shape, dtype)

    def parts(self, shape: tuple[int, int]) -> tuple[tuple[str, tuple[int, int]], ...]:
        """NumPy dtype and shape of each part of a matrix of this shape, in the order of ROLES."""
        rows, columns = shape
        groups = columns // self.group
        return (
            ("int32", (rows, _words(columns, self.bits))),
            ("int32", (_words(rows, self.bits), groups)),
            ("bfloat16", (rows, groups)),
        )

    def round(self, weight: NDArray[Any]) -> Parts:
        """weight [N, K] of any floating type, whose K the group divides, rounded to the nearest numbers. What a group
        means is (number - zero) * scale. Holds a few megabytes beside the result."""
        rows, columns = weight.shape
        groups = columns // self.group
        packed = np.empty((rows, _words(columns, self.bits)), np.int32)
        zeros = np.empty((rows, groups), np.uint8)
        scales = np.empty((rows, groups), ml_dtypes.bfloat16)
        step = max(1, _SLAB // columns)
        for start in range(0, rows, step):
            slab = slice(start, start + step)
            grouped = weight[slab].astype(np.float32).reshape(-1, groups, self.group)
            zeros[slab], scales[slab] = self.grid(grouped)
            numbers = grouped / steps(scales[slab])[:, :, None]
            np.rint(numbers, out=numbers)
            numbers += zeros[slab, :, None]
            values = numbers.clip(0, self.top, out=numbers).astype(np.uint8)
            packed[slab] = _streams(values.reshape(-1, columns), self.bits)
        return Parts(packed, _columns(zeros, self.bits), scales)

    @property
    def top(self) -> int:
        """The largest number."""
        return int(2**self.bits - 1)

    def grid(self, grouped: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """grouped [n, G, group] -> zero points [n, G] and scales [n, G] of the groups."""
        low, high = grouped.min(axis=2).clip(max=0), grouped.max(axis=2).clip(min=0)
        scales = _rounded_up((high - low) / np.float32(self.top))
        return np.rint(-low / steps(scales)).astype(np.uint8), scales

    def pack(self, numbers: NDArray[np.uint8], zeros: NDArray[np.uint8], scales: NDArray[Any]) -> Parts:
        """The parts of numbers [N, K] with these zero points [N, G] and scales [N, G]."""
        return Parts(_streams(numbers, self.bits), _columns(zeros, self.bits), scales)


def steps(scales: NDArray[Any]) -> NDArray[np.float32]:
    """What numbers are divided by: the scales, and 1 for a group of zeros."""
    found = scales.astype(np.float32)
    found[found == 0] = 1
    return found


def _rounded_up(scales: NDArray[np.float32]) -> NDArray[Any]:
    """Positive numbers as the smallest bfloat16 that are not less."""
    bits = np.ascontiguousarray(scales).view(np.uint32)
    upper = (bits >> np.uint32(16)) + (bits & np.uint32(0xFFFF) > 0)
    return upper.astype(np.uint16).view(ml_dtypes.bfloat16)


def _words(count: int, bits: int) -> int:
    """Words of 32 bits that hold so many numbers."""
    return -(-count * bits // 32)


def _columns(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """zeros [N, G] -> [words, G], each column a stream."""
    return np.ascontiguousarray(_streams(np.ascontiguousarray(zeros.T), bits).T)


def _streams(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """numbers [n, count] -> [n, words]: each row a stream, the lowest bits first, filled up with zeros."""
    rows, count = numbers.shape
    padded = np.zeros((rows, _words(count, bits) * 32 // bits), np.uint8)
    padded[:, :count] = numbers
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(padded).view("<i4")

"""Whole numbers of a few bits, unpacked from words in which they follow each other, the lowest bits first."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SLAB = 1 << 16
"""Values that are unpacked at once, so that what lies between stays in the processor's cache."""


def unpack_rows(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """words [n, w] of any little-endian integers, each row a stream of numbers of `bits` -> the first `count`: [n,
    count]."""
    result = np.empty((len(words), count), np.uint8)
    step = max(1, SLAB // max(count, 1))
    for start in range(0, len(words), step):
        slab = np.ascontiguousarray(words[start : start + step]).view(np.uint8)
        result[start : start + step] = _unpack(slab, bits)[:, :count]
    return result


def unpack_columns(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """words [w, n], each column a stream of numbers of `bits` -> the first `count`, a row each: [n, count]."""
    result = np.empty((words.shape[1], count), np.uint8)
    step = max(16, SLAB // max(count, 1))
    for start in range(0, len(result), step):
        slab = np.ascontiguousarray(words[:, start : start + step].T).view(np.uint8)
        result[start : start + step] = _unpack(slab, bits)[:, :count]
    return result


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """packed [n, bytes] -> [n, values]. Two and four bits spread a byte over a wider number in one go."""
    if bits == 8:
        return packed
    if bits == 4:
        two = packed.astype("<u2")
        two |= two << 4
        two &= 0x0F0F
        return two.view(np.uint8)
    if bits == 2:
        four = packed.astype("<u4")
        four |= four << 12
        four |= four << 6
        four &= 0x03030303
        return four.view(np.uint8)
    rows, size = packed.shape
    eights = -(-size // bits)  # eight numbers are as many bytes as one has bits
    whole = np.zeros((rows, eights * bits), np.uint8)
    whole[:, :size] = packed
    eight = np.zeros((rows, eights), np.uint64)
    for place in range(bits):
        eight |= whole[:, place::bits].astype(np.uint64) << np.uint64(8 * place)
    result = np.empty((rows, eights, 8), np.uint8)
    for place in range(8):
        np.bitwise_and(
            eight >> np.uint64(bits * place), np.uint64(2**bits - 1), out=result[..., place], casting="unsafe"
        )
    return result.reshape(rows, -1)

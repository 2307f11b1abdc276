"""Floating types of 4, 8 and 16 bits as float32, without the library that adds them to NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What the 4-bit floats of MXFP4 and NVFP4 mean."""
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
WIDE = ("float16", "bfloat16", "float32")


def widen(values: NDArray[Any]) -> NDArray[np.float32]:
    """The same numbers in float32. Of 8-bit floats those of EIGHT_BITS and float8_e8m0fnu."""
    kind = values.dtype.name
    if kind == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind in EIGHT_BITS:
        return _TABLES[kind].take(np.ascontiguousarray(values).view(np.uint8), mode="clip")
    if kind == "float8_e8m0fnu":
        return power_of_two(np.ascontiguousarray(values).view(np.uint8))
    return values.astype(np.float32)


def of_pairs(packed: NDArray[np.uint8], table: NDArray[np.float32], *, high_first: bool) -> NDArray[np.float32]:
    """packed [..., n], two 4-bit numbers in each byte -> what they mean by a table of 16: [..., 2 * n]."""
    high, low = np.repeat(table, 16), np.tile(table, 16)
    both = np.stack([high, low] if high_first else [low, high], axis=-1).astype(np.float32)
    return both.view(np.complex64)[:, 0].take(packed, mode="clip").view(np.float32)  # NumPy's one type of two floats


def power_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """2 ** (exponent - 127): what the OCP's E8M0 scales mean; 255 is NaN."""
    return _POWERS[exponents]


def _table(exponent_bits: int, mantissa_bits: int, infinite: bool) -> NDArray[np.float32]:
    """The 256 values of an 8-bit float. With `infinite`, the highest exponent is infinity and NaN, as in IEEE 754; else
    only the number of all ones is NaN."""
    code = np.arange(256)
    sign = np.where(code >= 128, -1.0, 1.0)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    value = sign * np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, np.maximum(exponent, 1) - bias)
    )
    if infinite:
        value = np.where(exponent == (1 << exponent_bits) - 1, np.where(mantissa == 0, sign * np.inf, np.nan), value)
    else:
        value = np.where(code & 127 == 127, np.nan, value)
    return value.astype(np.float32)


_POWERS = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
_TABLES = {"float8_e4m3fn": _table(4, 3, infinite=False), "float8_e5m2": _table(5, 2, infinite=True)}

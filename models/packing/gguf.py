"""The types of .gguf files, as llama.cpp lays them out in blocks along a row (ggml/src/ggml-common.h)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing.base import Groups, Parts, check_part
from stageline.models.tensors import Packing

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]

_SLAB = 1 << 17
"""Bytes of blocks that are unpacked at once, so that what lies between stays in the processor's cache."""
_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the 4-bit numbers of IQ4_NL and IQ4_XS mean."""


class _Type(NamedTuple):
    """A type that is whole numbers in groups. `unpack` takes blocks [n, block_bytes] and fills values [n, block]; it
    returns the scale of each group [n, groups] and, if there is no `zero` for all, its offset."""

    block: int
    block_bytes: int
    bits: int
    group: int
    zero: int | None
    unpack: Callable[[_Bytes, _Bytes], tuple[_Floats, _Floats | None]]


class Gguf:
    """`settings`: {"type": the name that gguf gives the type}. One part: blocks, uint8 [..., bytes of a row]."""

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless the blocks are as many as the shape needs."""
        kind = str(packing.settings.get("type"))
        block, block_bytes = _block(kind)
        *rows, columns = packing.shape or (0,)
        if columns < 1 or columns % block:
            raise CheckpointError(f"{kind} has blocks of {block} values, but a row has {columns:,}")
        check_part(parts, "blocks", "uint8", (*rows, columns // block * block_bytes))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """Whole numbers in groups of 32 or 16; None for the types that look up a table or a grid."""
        found = _TYPES.get(str(packing.settings["type"]))
        if found is None:
            return None
        columns = packing.shape[-1]
        blocks = arrays["blocks"].reshape(-1, found.block_bytes)
        per_block = found.block // found.group
        values = np.empty((len(blocks), found.block), np.uint8)
        scales = np.empty((len(blocks), per_block), np.float32)
        offsets = np.empty_like(scales)
        step = max(1, _SLAB // found.block_bytes)
        for start in range(0, len(blocks), step):
            slab = slice(start, start + step)
            scales[slab], own = found.unpack(blocks[slab], values[slab])
            offsets[slab] = scales[slab] * np.float32(-(found.zero or 0)) if own is None else own
        rows = len(blocks) * found.block // columns
        return Groups(
            values=values.reshape(rows, columns),
            bits=found.bits,
            group=found.group,
            scales=scales.reshape(rows, -1),
            offsets=offsets.reshape(rows, -1),
            zeros=None if found.zero is None else np.full((rows, columns // found.group), found.zero, np.uint8),
        )

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> _Floats:
        """The values that llama.cpp computes with. CheckpointError for a type that needs gguf, if it is not there."""
        kind = str(packing.settings["type"])
        found = self.groups(packing, arrays)
        if found is not None:
            return found.weight().reshape(packing.shape)
        blocks = arrays["blocks"].reshape(-1, _block(kind)[1])
        if kind == "IQ4_NL":
            return _iq4_nl(blocks).reshape(packing.shape)
        if kind == "IQ4_XS":
            return _iq4_xs(blocks).reshape(packing.shape)
        gguf = _library(kind)
        try:
            return np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]), np.float32).reshape(
                packing.shape
            )
        except NotImplementedError as error:
            raise CheckpointError(
                f"the type {kind} is one that gguf cannot dequantise; convert the model to another type, such as Q8_0"
            ) from error


def _block(kind: str) -> tuple[int, int]:
    """The values and the bytes of a block."""
    if kind in _TYPES:
        return _TYPES[kind].block, _TYPES[kind].block_bytes
    if kind in _TABLED:
        return _TABLED[kind]
    gguf = _library(kind)
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    except KeyError as error:
        raise CheckpointError(f"the type {kind!r} is unknown to the installed gguf; update it") from error
    return int(block), int(block_bytes)


def _library(kind: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"the type {kind!r} is read with gguf: pip install gguf") from error
    return gguf


def _halves(blocks: _Bytes, start: int, count: int = 1) -> _Floats:
    """The float16 numbers at byte `start` of each block: [n, count]."""
    return np.ascontiguousarray(blocks[:, start : start + 2 * count]).view("<f2").astype(np.float32)


def _nibbles(packed: _Bytes, values: _Bytes) -> None:
    """packed [..., n] -> values [..., 2, n]: the low halves of the bytes, then the high ones; eight bytes at once."""
    if packed.shape[-1] % 8:
        np.bitwise_and(packed, 15, out=values[..., 0, :])
        np.right_shift(packed, 4, out=values[..., 1, :])
        return
    eights, wide, halves = np.ascontiguousarray(packed).view("<u8"), values.view("<u8"), np.uint64(0x0F0F0F0F0F0F0F0F)
    for place in range(eights.shape[-1]):
        np.bitwise_and(eights[..., place], halves, out=wide[..., 0, place])
        np.bitwise_and(eights[..., place] >> np.uint64(4), halves, out=wide[..., 1, place])


def _quarters(packed: _Bytes, values: _Bytes) -> None:
    """packed [..., n] -> values [..., 4, n], two bits each, the lowest of all bytes first."""
    for place in range(4):
        np.right_shift(packed, 2 * place, out=values[..., place, :])
    np.bitwise_and(values, 3, out=values)


def _add_bits(packed: _Bytes, values: _Bytes, bit: int) -> None:
    """packed [n, 32] -> that bit of values [n, 256]: bit p of byte i is of value 32 * p + i."""
    source, kept = np.ascontiguousarray(packed), np.uint8(1 << bit)
    for place in range(8):
        moved = source << np.uint8(bit - place) if place < bit else source >> np.uint8(place - bit)
        moved &= kept
        values[:, 32 * place : 32 * place + 32] |= moved


def _fifth_bits(blocks: _Bytes, start: int) -> _Bytes:
    """Bit 4 of each of 32 values, from 4 bytes of a block."""
    packed = np.ascontiguousarray(blocks[:, start : start + 4])
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, None]:
    _nibbles(blocks[:, 2:], values.reshape(-1, 2, 16))
    return _halves(blocks, 0), None


def _q4_1(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, _Floats]:
    _nibbles(blocks[:, 4:], values.reshape(-1, 2, 16))
    return _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, None]:
    _nibbles(blocks[:, 6:], values.reshape(-1, 2, 16))
    values |= _fifth_bits(blocks, 2)
    return _halves(blocks, 0), None


def _q5_1(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, _Floats]:
    _nibbles(blocks[:, 8:], values.reshape(-1, 2, 16))
    values |= _fifth_bits(blocks, 4)
    return _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, None]:
    np.bitwise_xor(blocks[:, 2:], 128, out=values)  # int8 + 128
    return _halves(blocks, 0), None


def _q2_k(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, _Floats]:
    """16 bytes of scales and minima, 64 of values, the scales' scale, the minima's scale."""
    _quarters(blocks[:, 16:80].reshape(-1, 2, 32), values.reshape(-1, 2, 4, 32))
    return _halves(blocks, 80) * (blocks[:, :16] & 15), -(_halves(blocks, 82) * (blocks[:, :16] >> 4))


def _q3_k(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, None]:
    """32 bytes of third bits, 64 of the lower two, 12 of scales of 6 bits, the scales' scale."""
    _quarters(blocks[:, 32:96].reshape(-1, 2, 32), values.reshape(-1, 2, 4, 32))
    _add_bits(blocks[:, :32], values, 2)
    scales = np.empty((len(blocks), 2, 8), np.uint8)
    _nibbles(blocks[:, 96:104], scales)
    high = np.empty((len(blocks), 4, 4), np.uint8)
    _quarters(blocks[:, 104:108], high)
    whole = scales.reshape(-1, 16) | high.reshape(-1, 16) << 4
    return _halves(blocks, 108) * (whole.astype(np.float32) - 32), None


def _scales_and_minima(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Of Q4_K and Q5_K: two scales of scales, then 8 scales and 8 minima of 6 bits in 12 bytes."""
    scale, minimum, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scale & 63, both & 15 | scale >> 6 << 4], axis=1)
    minima = np.concatenate([minimum & 63, both >> 4 | minimum >> 6 << 4], axis=1)
    return _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minima)


def _q4_k(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, _Floats]:
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), values.reshape(-1, 4, 2, 32))
    return _scales_and_minima(blocks)


def _q5_k(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, _Floats]:
    """As Q4_K, with 32 bytes of fifth bits before the values."""
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), values.reshape(-1, 4, 2, 32))
    _add_bits(blocks[:, 16:48], values, 4)
    return _scales_and_minima(blocks)


def _q6_k(blocks: _Bytes, values: _Bytes) -> tuple[_Floats, None]:
    """128 bytes of lower halves, 64 of the upper two bits, 16 scales (int8), the scales' scale."""
    high = np.empty((len(blocks), 2, 4, 32), np.uint8)
    _quarters(blocks[:, 128:192].reshape(-1, 2, 32), high)
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), values.reshape(-1, 2, 2, 64))
    values |= high.reshape(-1, 256) << 4
    return _halves(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _iq4_nl(blocks: _Bytes) -> _Floats:
    values = np.empty((len(blocks), 2, 16), np.uint8)
    _nibbles(blocks[:, 2:], values)
    return _TABLE[values.reshape(-1, 32)] * _halves(blocks, 0)


def _iq4_xs(blocks: _Bytes) -> _Floats:
    """The scales' scale, 2 bytes of upper two bits of 8 scales, 4 of their lower halves, 128 of values."""
    values = np.empty((len(blocks), 8, 2, 16), np.uint8)
    _nibbles(blocks[:, 8:].reshape(-1, 8, 16), values)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | high << 4).astype(np.float32) - 32
    steps: _Floats = _halves(blocks, 0) * scales
    return _TABLE[values.reshape(-1, 8, 32)] * steps[..., None]


_TYPES = {
    "Q4_0": _Type(32, 18, 4, 32, 8, _q4_0),
    "Q4_1": _Type(32, 20, 4, 32, None, _q4_1),
    "Q5_0": _Type(32, 22, 5, 32, 16, _q5_0),
    "Q5_1": _Type(32, 24, 5, 32, None, _q5_1),
    "Q8_0": _Type(32, 34, 8, 32, 128, _q8_0),
    "Q2_K": _Type(256, 84, 2, 16, None, _q2_k),
    "Q3_K": _Type(256, 110, 3, 16, 4, _q3_k),
    "Q4_K": _Type(256, 144, 4, 32, None, _q4_k),
    "Q5_K": _Type(256, 176, 5, 32, None, _q5_k),
    "Q6_K": _Type(256, 210, 6, 16, 32, _q6_k),
}
_TABLED = {"IQ4_NL": (32, 18), "IQ4_XS": (256, 136)}

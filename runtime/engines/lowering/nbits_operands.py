"""A matrix of whole numbers in groups as ONNX Runtime's MatMulNBits takes it: whole zero points, blocks of a few sizes.

The operator computes (value - zero) * scale with a whole zero point. An offset that is none is split: the nearest zero
point, and what is left of it, one number for each block. That number times the sum of the block's activations is what
the product lacks. So the sums follow the activations, and these numbers the columns of the matrix, as further columns;
of four bits twice, the second time what the first ones lack.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.packing.base import Groups

BLOCK = 32
"""Values of a block where the groups leave a choice, and of a matrix that is quantised on opening."""
_LEVELS = {4: 2, 8: 1}
_BLOCKS = (128, 64, 32, 16)  # that the operator takes, of those that divide a group the largest


@dataclass(frozen=True)
class Operands:
    """A matrix [N, K] for MatMulNBits. `values` uint8 [N, blocks, block * bits / 8], `scales` float32 [N, blocks],
    `zeros` uint8 [N, blocks * bits / 8], two of four bits in a byte, the first in the lower half.

    `levels`: how often the columns are followed by one for the sum of each block (0: not at all), from the second time
    on at the start of a block. `order`: the column of the activations that each of the K is multiplied by; None: the
    same.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    bits: int
    block: int
    columns: int
    levels: int
    order: NDArray[np.int64] | None

    @property
    def sums(self) -> int:
        """How many blocks K has."""
        return -(-self.columns // self.block)

    @property
    def padding(self) -> int:
        """Columns between the sums of one level and the next."""
        return -self.sums % self.block

    @property
    def width(self) -> int:
        """All columns that the operator reads."""
        return self.columns + self.levels * self.sums + (self.padding if self.levels > 1 else 0)

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """What the operator reads beside the activations, in its order."""
        return [self.values, self.scales, self.zeros]


def operands(groups: Groups) -> Operands | None:
    """The matrix for the operator; None if it takes no such groups."""
    columns = groups.values.shape[1]
    bits, block = _stored_bits(groups.bits), _block(groups.group, columns)
    if block is None or (groups.zeros is None and columns % block):
        return None
    blocks = -(-columns // block)
    of = np.minimum(np.arange(blocks) * block // groups.group, groups.scales.shape[1] - 1)
    scales, offsets = groups.scales[:, of], groups.offsets[:, of]
    rest = None
    if groups.zeros is not None:
        zeros = groups.zeros[:, of]
    else:
        zeros, rest = _split(scales, offsets, 2**bits - 1)
    values = _blocks(groups.values, blocks, block, zeros)
    levels = 0 if rest is None else _LEVELS[bits]
    for _ in range(levels):
        assert rest is not None
        more, their_scales, rest = _symmetric(rest, bits, block)
        values, scales = np.concatenate([values, more], axis=1), np.concatenate([scales, their_scales], axis=1)
        zeros = np.concatenate([zeros, np.full(their_scales.shape, 2 ** (bits - 1), np.uint8)], axis=1)
    return Operands(
        _packed(values, bits),
        np.ascontiguousarray(scales),
        _packed(zeros, bits),
        bits,
        block,
        columns,
        levels,
        groups.order,
    )


def operand_bytes(rows: int, columns: int, bits: int, group: int, whole: bool) -> int | None:
    """Bytes of the operands of a matrix [rows, columns]; `whole`: of whole zero points. None as of `operands`."""
    bits, block = _stored_bits(bits), _block(group, columns)
    if block is None or (not whole and columns % block):
        return None
    blocks = -(-columns // block)
    if not whole:
        blocks += _LEVELS[bits] * -(-blocks // block)
    return rows * (blocks * block * bits // 8 + 4 * blocks + -(-blocks * bits // 8))


def _stored_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8


def _block(group: int, columns: int) -> int | None:
    """The values of a block: all of one have one scale."""
    if group >= columns:
        return 16 if columns % BLOCK == 16 else BLOCK
    return next((block for block in _BLOCKS if group % block == 0), None)


def _split(
    scales: NDArray[np.float32], offsets: NDArray[np.float32], top: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The nearest whole zero points, and what is left of the offsets."""
    zeros = np.rint(np.divide(-offsets, scales, out=np.zeros_like(offsets), where=scales != 0)).clip(0, top)
    return zeros.astype(np.uint8), offsets + zeros.astype(np.float32) * scales


def _symmetric(
    weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """weight [N, K], of both signs, in blocks of whole numbers around one zero point: values [N, blocks, block], scales
    [N, blocks], and what is left of the weight [N, K]."""
    rows, columns = weight.shape
    blocks, zero = -(-columns // block), np.float32(2 ** (bits - 1))
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    scales = np.abs(grouped).max(axis=2) / (zero - 1)
    steps = np.rint(grouped / np.where(scales == 0, 1, scales)[:, :, None])
    left = (grouped - steps * scales[:, :, None]).reshape(rows, -1)[:, :columns]
    return (steps + zero).astype(np.uint8), scales, left


def _blocks(values: NDArray[np.uint8], blocks: int, block: int, zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, K] -> [N, blocks, block]. What fills the last block counts as zero."""
    rows, columns = values.shape
    if columns == blocks * block:
        return values.reshape(rows, blocks, block)
    padded = np.repeat(zeros, block, axis=1)
    padded[:, :columns] = values
    return padded.reshape(rows, blocks, block)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two values of four bits share a byte, along the last axis."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | values[..., 1::2] << np.uint8(4)

"""What a method of quantisation is, and the two forms that all of them unpack to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.tensors import Packing, TensorEntry

Parts = Mapping[str, tuple[str, tuple[int, ...]]]
"""NumPy dtype and shape of each part, by its role."""

_SLAB = 1 << 17
"""Values that are computed at once, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Groups:
    """A matrix of whole numbers, a scale and an offset for each group of `group` columns of a row:

        weight[n, order[k]] = values[n, k] * scales[n, k // group] + offsets[n, k // group]

    The last group of a row may be short. Computed in float32 in this order, that is the exact weight; where `zeros` is
    there, the exact weight is (value - zero) * scale, which is the same number for scales of 16 bits.
    """

    values: NDArray[np.uint8]
    """[N, K], each below 2**bits."""
    bits: int
    group: int
    scales: NDArray[np.float32]
    """[N, ceil(K / group)]"""
    offsets: NDArray[np.float32]
    """[N, ceil(K / group)]"""
    zeros: NDArray[np.uint8] | None = None
    """[N, ceil(K / group)], where every offset is -zero * scale of a whole zero point below 2**bits."""
    order: NDArray[np.int64] | None = None
    """[K], the column of the weight that each column of `values` is; None: the same."""

    def weight(self) -> NDArray[np.float32]:
        """The exact weight [N, K]."""
        rows, columns = self.values.shape
        result = np.empty((rows, columns), np.float32)
        step = max(1, _SLAB // max(columns, 1))
        for start in range(0, rows, step):
            slab = slice(start, start + step)
            target = result[slab] if self.order is None else np.empty_like(result[slab])
            np.copyto(target, self.values[slab])
            scales = self._spread(self.scales[slab])
            parts = target.reshape(*scales.shape[:2], -1)
            if self.zeros is None:
                parts *= scales
                parts += self._spread(self.offsets[slab])
            else:
                parts -= self._spread(self.zeros[slab].astype(np.float32))
                parts *= scales
            if self.order is not None:
                result[slab, self.order] = target
        return result

    def _spread(self, each: NDArray[Any]) -> NDArray[Any]:
        """A number for each group, [n, groups, 1], or for each column, [n, K, 1], where the last group is short."""
        columns = self.values.shape[1]
        if columns % self.group:
            each = np.repeat(each, self.group, axis=1)[:, :columns]
        return each[..., None]


class Method(Protocol):
    """A method of quantisation. `arrays` holds the parts of a weight as they lie in the file, by their role."""

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless the parts are those of a weight so packed, as far as types and shapes tell. After it,
        arrays of these types and shapes are taken as they are."""
        ...

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """The weight as whole numbers in groups; None if the method is of another kind (a table of values, floats).
        CheckpointError if the numbers themselves cannot be."""
        ...

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The exact weight, of the packing's shape."""
        ...


def check_part(parts: Parts, role: str, dtype: str | tuple[str, ...], shape: tuple[int, ...]) -> None:
    """CheckpointError unless there is a part of that role, dtype (or one of these) and shape."""
    if role not in parts:
        raise CheckpointError(f"its {role} is missing")
    held, found = parts[role]
    wanted = (dtype,) if isinstance(dtype, str) else dtype
    if held not in wanted or found != shape:
        raise CheckpointError(f"its {role} is {held} {list(found)}, {' or '.join(wanted)} {list(shape)} is needed")


@dataclass(frozen=True)
class Found:
    """A quantised weight that a method finds among a checkpoint's tensors."""

    method: str
    """A key of METHODS."""
    name: str
    """Of the weight that it stands for."""
    shape: tuple[int, ...]
    settings: Mapping[str, int | str]
    parts: Mapping[str, TensorEntry]
    unneeded: tuple[str, ...] = ()
    """Tensors that belong to it and say nothing about its values (scales of activations)."""


class Reader(Protocol):
    """What a method says of checkpoints. `stated` is the object in config.json that states the quantisation."""

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """What of it is not read, in a few words; empty if bits, format or type say it themselves; None if all is."""
        ...

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """The quantised weights. CheckpointError if a part is missing or of another rank."""
        ...

"""Weights of which each block of rows and columns has a scale: what the fp8 formats and compressed-tensors share.

`settings` of these: block_rows and block_columns, the rows and columns of the weight that have a scale together (-1:
all of them).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing.base import Parts, check_part
from stageline.models.packing.bits import SLAB
from stageline.models.tensors import Packing

Numbers = Callable[[slice], NDArray[np.float32]]
"""Some rows of a matrix of numbers that have no scale yet."""


def grid(packing: Packing) -> tuple[int, int]:
    """Scales along the rows and along the columns of a matrix. CheckpointError if the settings are no sizes."""
    counts = []
    for size, setting in zip(packing.shape, ("block_rows", "block_columns"), strict=True):
        block = packing.settings.get(setting)
        if not isinstance(block, int) or (block < 1 and block != -1):
            raise CheckpointError(f"it has the {setting} {block!r}, a positive number or -1 is needed")
        counts.append(1 if block == -1 else -(-size // block))
    return counts[0], counts[1]


def check_scale(parts: Parts, role: str, dtypes: tuple[str, ...], grid: tuple[int, int]) -> None:
    """CheckpointError unless the part has a number for each block; an axis of one may be left out."""
    shape = parts[role][1] if role in parts else grid
    left_out: list[tuple[int, ...]] = [(grid[0],)] if grid[1] == 1 else []
    if grid == (1, 1):
        left_out.append(())
    check_part(parts, role, dtypes, shape if shape in left_out else grid)


def by_row(packing: Packing, each: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """A number for each block -> for each row of the weight and group of its columns, [N, G], and the group's size."""
    rows, columns = packing.shape
    block_rows, block_columns = int(packing.settings["block_rows"]), int(packing.settings["block_columns"])
    each = each.reshape(grid(packing))
    repeated = np.repeat(each, rows if block_rows == -1 else block_rows, axis=0)[:rows]
    return repeated, columns if block_columns == -1 else block_columns


def weight(numbers: Numbers, scales: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """float32 [N, K]: `numbers` of some rows, [n, K], times the scale [N, G] of each group of columns."""
    columns = numbers(slice(0, 0)).shape[1]
    result = np.empty((len(scales), columns), np.float32)
    step = max(1, SLAB // max(columns, 1))
    for start in range(0, len(scales), step):
        rows = slice(start, start + step)
        if columns % group:
            np.multiply(numbers(rows), np.repeat(scales[rows], group, axis=1)[:, :columns], out=result[rows])
        else:
            grouped = result[rows].reshape(-1, columns // group, group)
            np.multiply(numbers(rows).reshape(grouped.shape), scales[rows, :, None], out=grouped)
    return result

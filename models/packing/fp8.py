"""8-bit floats with a scale for the tensor, each row or each block: HF's fp8, fbgemm_fp8 and ModelOpt's FP8."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.packing import grouped, scaled
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.floats import EIGHT_BITS, WIDE, widen
from stageline.models.tensors import Packing, TensorEntry


class Fp8:
    """`settings`: block_rows and block_columns, the weight's rows and columns that have a scale together (-1: all).
    Parts: weight float8 [N, K]; scale, a number for each block. weight = number * scale, whatever the name of the
    scale says (`weight_scale_inv` is what the weight was divided by)."""

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit the blocks and the weight's shape."""
        check_part(parts, "weight", EIGHT_BITS, grouped.sides(packing))
        scaled.check_scale(parts, "scale", (*WIDE, "float8_e8m0fnu"), scaled.grid(packing))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """None: these are no whole numbers."""
        return None

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """number * scale."""
        scales, group = scaled.by_row(packing, widen(arrays["scale"]))
        return scaled.weight(lambda rows: widen(arrays["weight"][rows]), scales, group)

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """None: there is one kind."""
        return None

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.weight` of 8-bit floats that has a scale. The blocks are those stated where there is more than one
        scale for a row."""
        stated_block = stated.get("weight_block_size")
        for stem, parts in grouped.beside(tensors, ".weight", ("weight_scale_inv", "weight_scale")):
            scale = parts.get("weight_scale_inv") or parts.get("weight_scale")
            if scale is None or parts["weight"].dtype not in EIGHT_BITS:
                continue
            rows, columns = grouped.matrix(parts, "weight")
            if scale.shape in ((), (1,), (1, 1)):
                block = (-1, -1)
            elif scale.shape in ((rows,), (rows, 1)):
                block = (1, -1)
            else:
                block = tuple(stated_block) if isinstance(stated_block, list) and len(stated_block) == 2 else (-1, -1)
            yield Found(
                method="fp8",
                name=f"{stem}.weight",
                shape=(rows, columns),
                settings={"block_rows": block[0], "block_columns": block[1]},
                parts={"weight": parts["weight"], "scale": scale},
            )

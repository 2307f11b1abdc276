"""AWQ's layout (AutoAWQ, version gemm): words along the outputs, eight numbers in an order of their own."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.packing import grouped
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.bits import SLAB
from stageline.models.packing.floats import WIDE, widen
from stageline.models.tensors import Packing, TensorEntry

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight outputs of a word each four bits hold, from the lowest."""


class Awq:
    """`settings`: bits (4), group_size (-1: one group). Parts, for K inputs, N outputs, G groups:

    qweight int32 [K, N / 8]; qzeros int32 [G, N / 8]; scales [G, N]

    weight[n, k] = (qweight[k, n] - zero[k // group, n]) * scales[k // group, n]
    """

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit bits, groups and the weight's shape."""
        outputs, inputs = grouped.sides(packing)
        bits = grouped.bits_of(packing, (4,))
        groups = grouped.count(inputs, grouped.size(packing))
        grouped.whole_words("outputs", outputs, bits)
        check_part(parts, "qweight", "int32", (inputs, outputs // 8))
        check_part(parts, "qzeros", "int32", (groups, outputs // 8))
        check_part(parts, "scales", WIDE, (groups, outputs))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """Whole numbers with whole zero points."""
        return grouped.ordered(self._unpacked(packing, arrays))

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """(value - zero) * scale."""
        return grouped.weight(self._unpacked(packing, arrays))

    def _unpacked(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> grouped.Unpacked:
        return grouped.Unpacked(
            values=_transposed(arrays["qweight"]),
            bits=4,
            group=grouped.size(packing),
            scales=np.ascontiguousarray(widen(arrays["scales"]).T),
            zeros=_transposed(arrays["qzeros"]),
        )

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """The versions gemv, marlin, llm-awq, ..., and what AutoAWQ does not write as gemm."""
        version = str(stated.get("version") or stated.get("format") or "gemm").lower()
        if stated.get("backend") == "llm-awq":
            version = "llm-awq"
        if version != "gemm":
            return f"in the version {version}"
        if stated.get("zero_point") is False:
            return "without zero points"
        return grouped.unread_bits(stated.get("bits") or stated.get("w_bit"), (4,))

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.qweight` with what is beside it."""
        for stem, parts in grouped.beside(tensors, ".qweight", ("qzeros", "scales")):
            inputs, words = grouped.matrix(parts, "qweight")
            yield Found(
                method="awq",
                name=f"{stem}.weight",
                shape=(words * 8, inputs),
                settings={"bits": 4, "group_size": grouped.stated_size(stated)},
                parts=parts,
            )


def _transposed(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """words [n, w] of eight outputs each -> [8 * w, n]."""
    rows, count = words.shape
    result = np.empty((count, 8, rows), np.uint8)
    step = max(1, SLAB // max(8 * rows, 1))
    for start in range(0, count, step):
        slab = slice(start, start + step)
        packed = np.ascontiguousarray(words[:, slab].T).view(np.uint8).reshape(-1, rows, 4)
        for place, output in enumerate(_ORDER):
            half = packed[..., place // 2]
            np.bitwise_and(half if place % 2 == 0 else half >> 4, 15, out=result[slab, output])
    return result.reshape(8 * count, rows)

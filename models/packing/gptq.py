"""GPTQ's layout (AutoGPTQ, GPTQModel): words along the inputs, zero points along the outputs, a group an input."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing import grouped
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.bits import unpack_columns, unpack_rows
from stageline.models.packing.floats import WIDE, widen
from stageline.models.tensors import Packing, TensorEntry

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


class Gptq:
    """`settings`: bits, group_size (-1: one group), checkpoint_format: gptq, whose zero points are stored less one, or
    gptq_v2. Parts, for K inputs, N outputs, G groups:

        qweight int32 [K * bits / 32, N]; qzeros int32 [G, N * bits / 32]; scales [G, N]
        g_idx int32 [K], the group of each input; if it is not there, they follow each other

        weight[n, k] = (qweight[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]
    """

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit bits, groups and the weight's shape."""
        outputs, inputs = grouped.sides(packing)
        bits = grouped.bits_of(packing, _BITS)
        if packing.settings.get("checkpoint_format") not in _FORMATS:
            raise CheckpointError(
                f"it has the format {packing.settings.get('checkpoint_format')!r}, read are {', '.join(_FORMATS)}"
            )
        groups = grouped.count(inputs, grouped.size(packing))
        grouped.whole_words("inputs", inputs, bits)
        grouped.whole_words("outputs", outputs, bits)
        check_part(parts, "qweight", "int32", (inputs * bits // 32, outputs))
        check_part(parts, "qzeros", "int32", (groups, outputs * bits // 32))
        check_part(parts, "scales", WIDE, (groups, outputs))
        if "g_idx" in parts:
            check_part(parts, "g_idx", ("int32", "int64"), (inputs,))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """Whole numbers with whole zero points; inputs by their group where `g_idx` mixes them. None if its groups are
        of different sizes. CheckpointError if it names a group that is not there."""
        return grouped.ordered(self._unpacked(packing, arrays), arrays.get("g_idx"))

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """(value - zero) * scale."""
        return grouped.weight(self._unpacked(packing, arrays), arrays.get("g_idx"))

    def _unpacked(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> grouped.Unpacked:
        outputs, inputs = packing.shape
        bits = int(packing.settings["bits"])
        zeros = unpack_rows(arrays["qzeros"], bits, outputs)
        if packing.settings["checkpoint_format"] == "gptq":
            zeros = zeros + np.uint8(1) & np.uint8(2**bits - 1)
        return grouped.Unpacked(
            values=unpack_columns(arrays["qweight"], bits, inputs),
            bits=bits,
            group=grouped.size(packing),
            scales=np.ascontiguousarray(widen(arrays["scales"]).T),
            zeros=np.ascontiguousarray(zeros.T),
        )

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """Layouts of other kernels, and bits that are none of ours."""
        kind = _format(stated)
        if kind not in _FORMATS:
            return f"in the format {kind}"
        return grouped.unread_bits(stated.get("bits"), _BITS)

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.qweight` with what is beside it. Where the config has rules by layer (`dynamic`), `g_idx` and the
        scales tell bits and group."""
        for stem, parts in grouped.beside(tensors, ".qweight", ("qzeros", "scales", "g_idx")):
            rows, outputs = grouped.matrix(parts, "qweight")
            bits, group = stated["bits"], grouped.stated_size(stated)
            if stated.get("dynamic") and {"g_idx", "scales"} <= parts.keys():
                inputs = max(math.prod(parts["g_idx"].shape), 1)
                bits = rows * 32 // inputs
                group = -(-inputs // max(*parts["scales"].shape[:1], 1, 1))
            yield Found(
                method="gptq",
                name=f"{stem}.weight",
                shape=(outputs, rows * 32 // max(bits, 1)),
                settings={"bits": bits, "group_size": group, "checkpoint_format": _format(stated)},
                parts=parts,
            )


def _format(stated: Mapping[str, Any]) -> str:
    named = stated.get("checkpoint_format") or stated.get("format") or "gptq"
    return "marlin" if stated.get("is_marlin_format") else str(named).lower()

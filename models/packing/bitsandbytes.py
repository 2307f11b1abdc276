"""bitsandbytes: nf4 and fp4, a table of 16 values and a scale for each block of a flat weight, and int8 rows."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing import grouped
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.bits import SLAB
from stageline.models.packing.floats import of_pairs
from stageline.models.tensors import Packing, TensorEntry, mapped

_INT8 = np.float32(1 / 127)
_STATE = ".quant_state.bitsandbytes__"
_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class Bitsandbytes:
    """`settings`: type: nf4, fp4 or int8; of the first two blocksize and nested_blocksize (0: scales are float32).
    Parts, for N outputs, K inputs, B blocks of the flat weight:

        nf4, fp4  weight uint8 [N * K / 2, 1], the high half of a byte first; quant_map float32 [16]; absmax float32 [B]
                  nested: absmax uint8 [B]; nested_quant_map float32 [256]; nested_absmax float32, for blocks of those
                  quant_state uint8, the text of a JSON object, whose nested_offset is added to nested scales
                  weight = quant_map[number] * absmax
        int8      weight int8 [N, K]; SCB float32 [N], the largest of each row. weight = number * SCB / 127
    """

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit the blocks and the weight's shape."""
        kind = packing.settings.get("type")
        if kind == "int8":
            outputs, inputs = grouped.sides(packing)
            check_part(parts, "weight", "int8", (outputs, inputs))
            check_part(parts, "SCB", "float32", (outputs,))
            return
        if kind not in ("nf4", "fp4"):
            raise CheckpointError(f"it has the type {kind!r}, read are nf4, fp4, int8")
        blocksize, nested = (packing.settings.get(name) for name in ("blocksize", "nested_blocksize"))
        if not isinstance(blocksize, int) or not isinstance(nested, int) or blocksize < 2 or blocksize % 2:
            raise CheckpointError(
                f"it has blocks of {blocksize!r} and nested ones of {nested!r}, even sizes are needed"
            )
        count = math.prod(packing.shape)
        blocks = -(-count // blocksize)
        check_part(parts, "weight", "uint8", (-(-count // 2), 1))
        check_part(parts, "quant_map", "float32", (16,))
        check_part(parts, "absmax", "uint8" if nested else "float32", (blocks,))
        if nested:
            check_part(parts, "nested_quant_map", "float32", (256,))
            check_part(parts, "nested_absmax", "float32", (-(-blocks // nested),))
            if "quant_state" not in parts:
                raise CheckpointError("its quant_state is missing")

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """int8 with the zero point 128; None for the tables of values."""
        if packing.settings["type"] != "int8":
            return None
        scales = arrays["SCB"].reshape(-1, 1) * _INT8
        zeros = np.full(scales.shape, 128, np.uint8)
        return grouped.ordered(grouped.Unpacked(arrays["weight"].view(np.uint8) ^ np.uint8(128), 8, -1, scales, zeros))

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The values. CheckpointError if the quant_state that it needs is damaged."""
        found = self.groups(packing, arrays)
        if found is not None:
            return found.weight()
        blocksize = int(packing.settings["blocksize"])
        scales = self._scales(packing, arrays)
        packed, table = arrays["weight"].reshape(-1), arrays["quant_map"]
        count = math.prod(packing.shape)
        result = np.empty(len(packed) * 2, np.float32)
        step = max(1, SLAB // blocksize) * blocksize
        for start in range(0, count, step):
            slab = result[start : start + step]
            slab[:] = of_pairs(packed[start // 2 : (start + step) // 2], table, high_first=True)
            slab *= np.repeat(scales[start // blocksize : (start + step) // blocksize], blocksize)[: len(slab)]
        return result[:count].reshape(packing.shape)

    def _scales(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        nested = int(packing.settings["nested_blocksize"])
        absmax = arrays["absmax"]
        if not nested:
            return absmax.astype(np.float32)
        offset = _state(arrays["quant_state"]).get("nested_offset", 0)
        if not isinstance(offset, float | int):
            raise CheckpointError(f"its quant_state has the nested_offset {offset!r}, a number is needed")
        steps = np.repeat(arrays["nested_absmax"], nested)[: len(absmax)]
        scales: NDArray[np.float32] = arrays["nested_quant_map"][absmax] * steps + np.float32(offset)
        return scales

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """None: what the parts cannot be is told by their types."""
        return None

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.weight` with a `.SCB` or a `.weight.absmax` beside it."""
        for stem, parts in grouped.beside(tensors, ".SCB", ("weight", "weight_format")):
            if "weight" not in parts:
                raise CheckpointError(f"{stem}.weight is missing")
            form = parts.pop("weight_format", None)
            if form is not None and mapped(form).any():
                raise CheckpointError(f"{stem}.weight is in an order of columns of its own; save it again")
            unneeded = (form.name,) if form is not None else ()
            yield Found(
                "bitsandbytes", f"{stem}.weight", grouped.matrix(parts, "weight"), {"type": "int8"}, parts, unneeded
            )
        states = {name.partition(_STATE)[0]: entry for name, entry in tensors.items() if _STATE in name}
        for name in tensors:
            if name.endswith(".absmax"):
                weight = name.removesuffix(".absmax")
                if weight not in states:
                    raise CheckpointError(f"{weight}.quant_state, which has its shape, is missing")
                yield _four_bits(weight, states[weight], tensors)


def _four_bits(weight: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Found:
    state = _state(mapped(entry))
    shape, blocksize, nested = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize", 0)
    if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
        raise CheckpointError(f"{entry.name} has the shape {shape!r}, a list of sizes is needed")
    parts = {part: tensors[f"{weight}.{part}"] for part in _TABLES if f"{weight}.{part}" in tensors}
    if weight in tensors:
        parts["weight"] = tensors[weight]
    settings = {"type": str(state.get("quant_type")), "blocksize": blocksize, "nested_blocksize": nested}
    return Found("bitsandbytes", weight, tuple(shape), settings, {**parts, "quant_state": entry})


def _state(text: NDArray[np.uint8]) -> dict[str, Any]:
    try:
        state = json.loads(text.tobytes())
    except ValueError as error:
        raise CheckpointError("its quant_state is not JSON; download it again") from error
    if not isinstance(state, dict):
        raise CheckpointError("its quant_state is no JSON object; download it again")
    return state

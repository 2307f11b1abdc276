"""4-bit floats: ModelOpt's NVFP4, with scales of scales, and gpt-oss's MXFP4, with powers of two, of all experts."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing import grouped, scaled
from stageline.models.packing.base import Found, Groups, Parts, check_part
from stageline.models.packing.floats import E2M1, of_pairs, power_of_two, widen
from stageline.models.tensors import Packing, TensorEntry

_NV, _MX = 16, 32
"""Inputs that share a scale."""


class Nvfp4:
    """Parts, for N outputs, K inputs: weight uint8 [N, K / 2], the low half of a byte first; weight_scale float8_e4m3fn
    [N, K / 16]; weight_scale_2 float32. weight = number * (weight_scale * weight_scale_2)"""

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit the weight's."""
        outputs, inputs = grouped.sides(packing)
        if inputs % _NV:
            raise CheckpointError(f"its {inputs:,} inputs are no multiple of {_NV}")
        check_part(parts, "weight", "uint8", (outputs, inputs // 2))
        check_part(parts, "weight_scale", "float8_e4m3fn", (outputs, inputs // _NV))
        scaled.check_scale(parts, "weight_scale_2", ("float32",), (1, 1))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """None: these are no whole numbers."""
        return None

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """number * scale."""
        scales = widen(arrays["weight_scale"]) * arrays["weight_scale_2"].reshape(())
        return scaled.weight(_numbers(arrays["weight"]), scales, _NV)

    @staticmethod
    def find(tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each `.weight` that has a `.weight_scale_2`."""
        for stem, parts in grouped.beside(tensors, ".weight", ("weight_scale", "weight_scale_2")):
            if "weight_scale_2" in parts:
                rows, half = grouped.matrix(parts, "weight")
                yield Found("nvfp4", f"{stem}.weight", (rows, 2 * half), {}, parts)


class Mxfp4:
    """Parts, for E experts, K inputs, N outputs: blocks uint8 [E, N, K / 32, 16], the low half of a byte first; scales
    uint8 [E, N, K / 32], exponents of two plus 127. The weight is [E, K, N], as gpt-oss multiplies by it."""

    def check(self, packing: Packing, parts: Parts) -> None:
        """CheckpointError unless types and shapes fit the weight's."""
        if len(packing.shape) != 3 or packing.shape[1] % _MX:
            raise CheckpointError(f"it has the shape {list(packing.shape)}, [experts, inputs, outputs] is needed")
        experts, inputs, outputs = packing.shape
        check_part(parts, "blocks", "uint8", (experts, outputs, inputs // _MX, _MX // 2))
        check_part(parts, "scales", "uint8", (experts, outputs, inputs // _MX))

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """None: these are no whole numbers."""
        return None

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """number * scale."""
        experts, inputs, outputs = packing.shape
        result = np.empty(packing.shape, np.float32)
        for expert in range(experts):
            packed = arrays["blocks"][expert].reshape(outputs, inputs // 2)
            scales = power_of_two(arrays["scales"][expert])
            result[expert] = scaled.weight(_numbers(packed), scales, _MX).T
        return result

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """None: there is one kind."""
        return None

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Each name that ends in `_blocks`, with the `_scales` beside it."""
        for name, entry in tensors.items():
            if name.endswith("_blocks"):
                weight = name.removesuffix("_blocks")
                scales = tensors.get(f"{weight}_scales")
                if len(entry.shape) != 4:
                    raise CheckpointError(f"{name} has the shape {list(entry.shape)}, four sizes are needed")
                experts, outputs, *inputs = entry.shape
                parts = {"blocks": entry} | ({} if scales is None else {"scales": scales})
                yield Found("mxfp4", weight, (experts, 2 * math.prod(inputs), outputs), {}, parts)


def _numbers(packed: NDArray[np.uint8]) -> scaled.Numbers:
    return lambda rows: of_pairs(packed[rows], E2M1, high_first=False)

"""Methods of quantisation, each in a module of its own: which tensors hold a weight, and which values they mean."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing.awq import Awq
from stageline.models.packing.base import Groups, Method, Parts
from stageline.models.packing.bitsandbytes import Bitsandbytes
from stageline.models.packing.compressed_tensors import CompressedTensors
from stageline.models.packing.fp4 import Mxfp4, Nvfp4
from stageline.models.packing.fp8 import Fp8
from stageline.models.packing.gguf import Gguf
from stageline.models.packing.gptq import Gptq
from stageline.models.tensors import PackedEntry, Packing, mapped

METHODS: dict[str, Method] = {
    "gguf": Gguf(),
    "gptq": Gptq(),
    "awq": Awq(),
    "compressed-tensors": CompressedTensors(),
    "fp8": Fp8(),
    "nvfp4": Nvfp4(),
    "mxfp4": Mxfp4(),
    "bitsandbytes": Bitsandbytes(),
}
"""Each method under the name that a `Packing` has."""


def check(packing: Packing, parts: Parts) -> None:
    """CheckpointError unless the method is known and the parts are those of a weight so packed."""
    if packing.method not in METHODS:
        raise CheckpointError(f"the method {packing.method!r} is unknown, known are {', '.join(METHODS)}")
    METHODS[packing.method].check(packing, parts)


def read(entry: PackedEntry) -> dict[str, NDArray[Any]]:
    """Its parts by role, mapped from their files. OSError if one cannot be read."""
    return {role: mapped(part) for role, part in entry.parts.items()}


def groups(packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
    """The weight as whole numbers in groups; None if the method is of another kind."""
    return METHODS[packing.method].groups(packing, arrays)


def dequantised(packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The exact weight, of the packing's shape."""
    return METHODS[packing.method].dequantise(packing, arrays)

"""Methods of quantisation, each in a module of its own: which tensors hold a weight, and which values they mean."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import CheckpointError
from stageline.models.packing.base import Groups, Method, Parts
from stageline.models.packing.gguf import Gguf
from stageline.models.tensors import Packing

METHODS: dict[str, Method] = {"gguf": Gguf()}


def check(packing: Packing, parts: Parts) -> None:
    """CheckpointError unless the method is known and the parts are those of a weight so packed."""
    if packing.method not in METHODS:
        raise CheckpointError(f"the method {packing.method!r} is unknown, known are {', '.join(METHODS)}")
    METHODS[packing.method].check(packing, parts)


def groups(packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
    """The weight as whole numbers in groups; None if the method is of another kind."""
    return METHODS[packing.method].groups(packing, arrays)


def dequantised(packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The exact weight, of the packing's shape."""
    return METHODS[packing.method].dequantise(packing, arrays)

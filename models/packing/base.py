"""What a method of quantisation is, and the two forms that all of them unpack to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
import numpy as np
from stageline.models.tensors import Packing


@dataclass(frozen=True)
class Groups:
    """A matrix of whole numbers, a scale and an offset for each group of `group` columns of a row:

        weight[n, order[k]] = values[n, k] * scales[n, k // group] + offsets[n, k // group]

    The last group of a row may be short. Computed in float32 in this order, that is the exact weight.
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


class Method(Protocol):
    """A method of quantisation. `arrays` holds the parts of a weight as they lie in the file, by their role."""

    def groups(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> Groups | None:
        """The weight as whole numbers in groups; None if the method is of another kind (a table of values, floats)."""
        ...

    def dequantise(self, packing: Packing, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The exact weight, of the packing's shape."""
        ...

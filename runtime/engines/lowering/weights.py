"""Weights in the form that a lowered graph needs: a tensor on disk, read in another type, or quantised."""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from stageline.models.errors import EngineError
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.external import Stored, read_stored
from stageline.runtime.engines.lowering.float32 import HALVES

_LARGEST = {ir.DataType.INT8: 127, ir.DataType.INT4: 7, ir.DataType.FLOAT8E4M3FN: 448}
"""The largest value of a type: a scale is a group's largest magnitude divided by it. Ranges are symmetric around 0."""


_PART = 2**24  # values that are quantised at a time


class BeyondRangeError(EngineError):
    """Values of the tensor named `tensor` are beyond the range of the type that it is to have."""

    def __init__(self, message: str, tensor: str) -> None:
        super().__init__(message)
        self.tensor = tensor


@dataclass(frozen=True)
class Weight:
    """A tensor on disk, which may be packed there, and its type in the graph."""

    tensor: Stored
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that `read` returns."""
        return tuple(int(size) for size in self.tensor.shape.numpy())

    @property
    def size_bytes(self) -> int:
        """Bytes of the array in an engine."""
        return -(-int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bitwidth // 8)

    def read(self) -> Array:
        """The values, contiguous: memory-mapped if the file has the same type, else converted. EngineError if one is
        beyond the type's range."""
        array = read_stored(self.tensor)
        if self.tensor.dtype == self.dtype:
            return array
        return np.ascontiguousarray(self._converted(array))

    def _converted(self, array: Array) -> Array:
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype.numpy())
        if self.dtype in HALVES:
            lost = array[np.isinf(converted) & np.isfinite(array)]
            if lost.size:
                raise _beyond_range(str(self.tensor.name), self.dtype, lost)
        return converted


@dataclass(frozen=True)
class QuantisedWeight(Weight):
    """A matrix with values of type `dtype`, each times the scale of its group: `group` consecutive values along `axis`,
    over which the products are summed. A scale is a value of `scale_dtype`, float16 or bfloat16."""

    axis: int
    group: int
    scale_dtype: ir.DataType

    def read(self) -> Array:
        """The quantised values, in the shape of the tensor."""
        quantised: Array = np.empty(self.shape, self.dtype.numpy())
        largest = _LARGEST[self.dtype]
        for place, groups in self._parts():
            values = groups / np.expand_dims(self._scales(groups), self.axis + 1)
            if self.dtype != ir.DataType.FLOAT8E4M3FN:
                np.rint(values, out=values)
            part = np.clip(values, -largest, largest, out=values).astype(self.dtype.numpy())
            quantised[place] = part.reshape(quantised[place].shape)
        return quantised

    def scales(self) -> NDArray[np.float32]:
        """float32 values that `scale_dtype` can hold, in the shape of the tensor with groups in place of values along
        `axis`."""
        return np.concatenate([self._scales(groups) for _, groups in self._parts()], axis=1 - self.axis)

    def _scales(self, groups: NDArray[np.float32]) -> NDArray[np.float32]:
        scales = np.abs(groups).max(axis=self.axis + 1) / np.float32(_LARGEST[self.dtype])
        limits = ml_dtypes.finfo(self.scale_dtype.numpy())  # type: ignore[no-untyped-call]
        scales = scales.clip(np.float32(limits.smallest_normal), np.float32(limits.max))
        return np.asarray(scales.astype(self.scale_dtype.numpy()), np.float32)

    def _parts(self) -> Iterator[tuple[tuple[slice, ...], NDArray[np.float32]]]:
        """Channels of the matrix, some at a time because they are widened to float32: where they are, and their values
        with `axis` split into groups."""
        array, other = read_stored(self.tensor), 1 - self.axis
        channels = max(1, _PART // self.shape[self.axis])
        for first in range(0, self.shape[other], channels):
            place = [slice(None), slice(None)]
            place[other] = slice(first, first + channels)
            values = np.asarray(array[tuple(place)], np.float32)
            shape = list(values.shape)
            shape[self.axis : self.axis + 1] = [shape[self.axis] // self.group, self.group]
            yield tuple(place), values.reshape(shape)


@dataclass(frozen=True)
class Scales(Weight):
    """The scales of a quantised weight. If one group covers the whole axis, the axis is left out."""

    of: QuantisedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that `read` returns."""
        shape, axis = list(self.of.shape), self.of.axis
        shape[axis : axis + 1] = [shape[axis] // self.of.group] if self.of.group < shape[axis] else []
        return tuple(shape)

    def read(self) -> Array:
        """The scales, in the graph's type. EngineError if a value of the matrix is beyond that type's range: its
        quantised value times the scale would be infinite."""
        super().read()
        return np.ascontiguousarray(self.of.scales().reshape(self.shape).astype(self.dtype.numpy()))


def _beyond_range(name: str, dtype: ir.DataType, lost: Array) -> BeyondRangeError:
    """What to say of the values `lost` of a tensor, which are finite and would be infinite in `dtype`."""
    limit = float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
    largest = float(np.abs(lost.astype(np.float64)).max())
    values = "1 value" if lost.size == 1 else f"{lost.size} values"
    wider = "bf16" if dtype == ir.DataType.FLOAT16 else "fp32"
    return BeyondRangeError(
        f"tensor {name!r} has {values} beyond the range of {dtype.name.lower()} ({limit:g}), the largest {largest:g}; "
        f"choose --precision {wider}",
        name,
    )


def unread(name: str, weight: Weight) -> ir.ExternalTensor:
    """The placeholder of a weight in a lowered graph: its type and shape, without data."""
    return ir.ExternalTensor("weights", 0, None, weight.dtype, shape=ir.Shape(weight.shape), name=name)

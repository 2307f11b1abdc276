"""Arrays in a GPU's memory, and copies of them in host memory.

Who may use a buffer, and until when (S is the stream of the stage that computes the value, T that of a stage that reads
it, R the stream in which the first stage's values are read back):

    S:  ─ kernels ─ ready ─────────────────────────────>       the value holds its buffer and the event `ready`
    T:              wait(ready) ─ copy or kernels ─ done ─>     `done` guards the buffer
    R:              wait(ready) ─ copy to pinned ─ read ──>     `read` guards the buffer; the host waits for it alone

When the last reference to the value is gone, the buffer returns to its pool, which waits for ready, done and read.
"""

from typing import Any, Protocol

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Array
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.events import Event
from stageline.runtime.devices.cuda.gpu import Gpu
from stageline.runtime.devices.cuda.pools import Buffer


class ArrayDevice(Protocol):
    """What an array needs from the device that made it."""

    gpu: Gpu

    def read(self, array: "CudaArray") -> "Reading":
        """Start a copy of `array` to host memory."""

    def failed(self, error: CudaError) -> EngineError:
        """The error that callers see in place of `error`."""


class CudaArray:
    """A value of a stage on a GPU. Keeps the promises of `DeviceArray`. `owner` is kept alive with it."""

    __slots__ = ("buffer", "device", "dtype", "owner", "ready", "shape")

    def __init__(
        self,
        device: ArrayDevice,
        buffer: Buffer,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        ready: Event,
        owner: object = None,
    ) -> None:
        self.device, self.buffer, self.shape, self.dtype = device, buffer, shape, dtype
        self.ready, self.owner = ready, owner

    @property
    def size_bytes(self) -> int:
        """Bytes of the array; its buffer may be larger."""
        return size_bytes(self.shape, self.dtype)

    def read(self) -> "Reading":
        """See `DeviceArray.read`."""
        return self.device.read(self)


class Reading:
    """A running copy to pinned memory. Keeps the promises of `HostCopy`. `event` happens when it is done."""

    __slots__ = ("_device", "_dtype", "_shape", "event", "pinned")

    def __init__(
        self, device: ArrayDevice, pinned: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], event: Event
    ) -> None:
        self._device, self.pinned, self._shape, self._dtype, self.event = device, pinned, shape, dtype, event

    def wait(self) -> Array:
        """See `HostCopy.wait`."""
        try:
            self._device.gpu.make_current()
            self.event.wait()
        except CudaError as error:
            raise self._device.failed(error) from error
        array = host_view(self.pinned.address, self._shape, self._dtype)
        return array.astype(np.float32) if is_half(self._dtype) else array.copy()


class _Memory:
    """Host memory with NumPy's array interface."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def host_view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Host memory as an array. The caller keeps the memory alive while the array is used."""
    size = size_bytes(shape, dtype)
    if size == 0:
        return np.empty(shape, dtype)
    return np.asarray(_Memory(address, size)).view(dtype).reshape(shape)


def size_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array."""
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension
    return size


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is float16, or bfloat16 of ml_dtypes."""
    return dtype == np.float16 or dtype.name == "bfloat16"

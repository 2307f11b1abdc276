"""One run of an engine in its stage's stream: inputs are brought to the GPU, then kernels, then the event of its end.

    with Launch(device, "stage 1") as launch:
        launch.put(value, buffer, dtype)       # or launch.local(value, dtype)
        launch.begin()
        ...                                    # the engine enqueues its kernels
        done = launch.end()                    # guards every buffer that was touched

Nothing here waits. How a value gets to the GPU depends on where it is:

    host array         ─ pinned buffer ─ upload ─>
    this GPU           ─ wait(ready) ─ copy, or none ─>
    a GPU it reaches   ─ wait(ready) ─ peer copy ─>
    any other GPU      ─ wait(ready) ─ download ─ pinned buffer ─ wait(read) ─ upload ─>
"""

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Array, Value
from stageline.runtime.devices.cuda.arrays import CudaArray, host_view, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.events import Event
from stageline.runtime.devices.cuda.pools import Buffer

_ALIGNED = 256  # bytes: what kernels may expect of an address


def packed(arrays: Mapping[str, Array]) -> tuple[dict[str, int], int]:
    """Where each array lies in one buffer for all, in bytes, and the size of that."""
    offsets, size = {}, 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-max(array.nbytes, 1) // _ALIGNED) * _ALIGNED
    return offsets, size


class Launch:
    """Used once, by the stage's worker. Errors of CUDA leave it as EngineError."""

    def __init__(self, device: CudaDevice, name: str) -> None:
        """`name`: what profilers show."""
        self._device, self._gpu, self._driver, self._name = device, device.gpu, device.gpu.driver, name
        self._touched: list[Buffer] = []
        self._kept: list[CudaArray] = []
        self._began: Event | None = None

    def __enter__(self) -> Self:
        try:
            self._gpu.make_current()
        except CudaError as error:
            raise self._device.failed(error) from error
        self._driver.push_range(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.pop_range()
        if self._touched or self._kept:  # it failed: what was enqueued may still run
            with suppress(CudaError, EngineError):
                self._gpu.make_current()
                self._guard(self._gpu.record(self._device.stream))
        if isinstance(error, CudaError):
            raise self._device.failed(error) from error

    def put(self, value: Value, target: Buffer, dtype: np.dtype[Any]) -> None:
        """Copy the value into `target`, in `dtype`."""
        self._touched.append(target)
        if isinstance(value, CudaArray) and value.dtype == dtype:
            self._move(value, target)
        else:  # another type must pass through the host, which waits for it: no engine returns such values
            array = value if isinstance(value, np.ndarray) else value.read().wait()
            self._upload(array, target.address, dtype)

    def upload(self, array: Array, target: Buffer, offset_bytes: int) -> None:
        """Copy an array into `target`, from `offset_bytes` on."""
        self._touched.append(target)
        self._upload(array, target.address + offset_bytes, array.dtype)

    def upload_all(self, arrays: Mapping[str, Array], target: Buffer, offsets: Mapping[str, int]) -> None:
        """Copy arrays into `target`, each to its place of `packed`, in one copy."""
        self._touched.append(target)
        size = max((offsets[name] + array.nbytes for name, array in arrays.items()), default=0)
        if size == 0:
            return
        pinned = self._gpu.pinned.take(size)
        for name, array in arrays.items():
            host_view(pinned.address + offsets[name], array.shape, array.dtype)[...] = array
        self._driver.upload(target.address, pinned.address, size, self._device.stream)
        self._touched.append(pinned)

    def local(self, value: Value, dtype: np.dtype[Any]) -> CudaArray:
        """The value on this GPU in `dtype`: itself if it is there already."""
        if isinstance(value, CudaArray) and value.dtype == dtype and value.device.gpu is self._gpu:
            self._await(value)
            return value
        target = self._gpu.memory.take(size_bytes(value.shape, dtype))
        self.put(value, target, dtype)
        return CudaArray(self._device, target, value.shape, dtype, self._gpu.record(self._device.stream))

    def adopt(
        self, caches: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]
    ) -> dict[str, Buffer]:
        """Those of an engine's `caches` that `shapes` names, on this GPU; copied only from other devices.

        EngineError if one is missing or of another shape.
        """
        for name, shape in shapes.items():
            if name not in caches:
                raise EngineError(f"{self._name} received no cache {name!r}")
            if tuple(caches[name].shape) != shape:
                raise EngineError(
                    f"{self._name}: cache {name!r} has shape {list(caches[name].shape)}, not {list(shape)}: caches do "
                    "not move between engines of different kinds"
                )
        return {name: self.local(caches[name], dtype).buffer for name in shapes}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """A buffer of this GPU for an array of this run."""
        buffer = self._gpu.memory.take(size_bytes(shape, dtype))
        self._touched.append(buffer)
        return buffer

    def touch(self, buffer: Buffer) -> None:
        """The run reads or writes this buffer as well."""
        self._touched.append(buffer)

    def await_guards(self, buffer: Buffer) -> None:
        """Let the stream wait for all work of other streams on a buffer that this run will write."""
        for guard in list(buffer.guards.values()):
            if guard.stream != self._device.stream and not guard.done():
                self._driver.wait(self._device.stream, guard.handle)

    def begin(self) -> None:
        """All inputs are enqueued; from here on it is the stage's own time."""
        self._began = self._gpu.record(self._device.stream)

    def end(self) -> Event:
        """Everything is enqueued. The event happens when it is done; no touched buffer is reused before."""
        done = self._gpu.record(self._device.stream)
        self._guard(done)
        if self._began is not None:
            self._device.computed(self._began, done)
        return done

    def _guard(self, done: Event) -> None:
        for buffer in self._touched:
            buffer.guard(done)
        for array in self._kept:
            array.buffer.guard(done)
        self._touched, self._kept = [], []

    def _await(self, array: CudaArray) -> None:
        self._kept.append(array)
        if array.ready.stream != self._device.stream:
            self._driver.wait(self._device.stream, array.ready.handle)

    def _upload(self, array: Array, address: int, dtype: np.dtype[Any]) -> None:
        size = size_bytes(array.shape, dtype)
        if size == 0:
            return
        pinned = self._gpu.pinned.take(size)
        host_view(pinned.address, array.shape, dtype)[...] = array
        self._driver.upload(address, pinned.address, size, self._device.stream)
        self._touched.append(pinned)

    def _move(self, array: CudaArray, target: Buffer) -> None:
        size, stream, there = array.size_bytes, self._device.stream, array.device.gpu
        if size == 0:
            return
        if there is self._gpu:
            self._await(array)
            self._driver.copy(target.address, array.buffer.address, size, stream)
        elif self._gpu.reaches(there):
            self._await(array)
            self._driver.copy_peer(target.address, self._gpu.context, array.buffer.address, there.context, size, stream)
        else:
            reading = array.read()
            self._gpu.make_current()
            self._driver.wait(stream, reading.event.handle)
            self._driver.upload(target.address, reading.pinned.address, size, stream)
            self._touched.append(reading.pinned)

"""The device of one stage on a GPU: a stream that computes, a stream that reads back, and their clock."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.cpu import start_worker
from stageline.runtime.devices.cuda.arrays import CudaArray, Reading
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.events import Event
from stageline.runtime.devices.cuda.gpu import Gpu
from stageline.runtime.devices.cuda.pools import Buffer


class CudaDevice:
    """A stage's part of a GPU. Keeps the promises of `Device`; owns its streams until `close()`, borrows the GPU."""

    # A weight of two bytes is read while an H100 computes with it for 295 tokens (989 TFLOP/s, 3.35 TB/s), an L4 for
    # 403 (121 TFLOP/s, 0.3 TB/s).
    step_tokens = 512

    def __init__(self, gpu: Gpu, stage: int, cores: tuple[int, ...], closed: Callable[[], None]) -> None:
        """`cores` may feed the GPU; `closed` is called once by `close`."""
        self.gpu, self.stage, self.cores, self.name = gpu, stage, cores, gpu.name
        self._closed: Callable[[], None] | None = closed
        gpu.make_current()
        self.stream, self.reading = gpu.driver.new_stream(), gpu.driver.new_stream()
        self._meter = gpu.clock.new_meter()

    def start_worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """See `Device.start_worker`. The thread may use any of `cores`: it enqueues and does not compute."""
        return start_worker(name, self.cores, work)

    def read(self, array: CudaArray) -> Reading:
        """Start a copy of an array of this device to host memory."""
        gpu, driver = self.gpu, self.gpu.driver
        try:
            gpu.make_current()
            pinned = gpu.pinned.take(array.size_bytes)
            driver.wait(self.reading, array.ready.handle)
            if array.size_bytes:
                driver.download(pinned.address, array.buffer.address, array.size_bytes, self.reading)
            event = gpu.record(self.reading)
        except CudaError as error:
            raise self.failed(error) from error
        pinned.guard(event)
        array.buffer.guard(event)
        return Reading(self, pinned, array.shape, array.dtype, event)

    def zeroed(self, size_bytes: int) -> Buffer:
        """A buffer that is zero for all work that is enqueued from now on. CudaError if there is no memory."""
        buffer = self.gpu.memory.take(size_bytes)
        self.gpu.driver.zero(buffer.address, size_bytes, self.stream)
        buffer.guard(self.gpu.record(self.stream))  # it may be dropped at once
        return buffer

    def arrays(
        self, buffers: Mapping[str, Buffer], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]
    ) -> dict[str, CudaArray]:
        """Buffers as arrays, complete once all work in the stream is done."""
        try:
            self.gpu.make_current()
            ready = self.gpu.record(self.stream)
        except CudaError as error:
            raise self.failed(error) from error
        for buffer in buffers.values():
            buffer.guard(ready)
        return {name: CudaArray(self, buffer, shapes[name], dtype, ready) for name, buffer in buffers.items()}

    def computed(self, began: Event, ended: Event) -> None:
        """Count the time between two events, once they have happened."""
        self.gpu.clock.computed(self._meter, began, ended)

    def busy_s(self) -> float:
        """See `Device.busy_s`."""
        try:
            self.gpu.make_current()
            self.gpu.clock.count()
        except (CudaError, EngineError):
            pass  # lost: keep what was counted
        return self._meter.busy_s

    @property
    def lost(self) -> str | None:
        """See `Device.lost`."""
        return self.gpu.why_lost

    def failed(self, error: CudaError) -> EngineError:
        """The error that callers see in place of `error`."""
        return self.gpu.failed(f"stage {self.stage}", error)

    def close(self) -> None:
        """Wait for running work. Streams and memory are freed when the pipeline's last GPU stage is closed: the others
        may still read here. May be called again."""
        closed, self._closed = self._closed, None
        if closed is None:
            return
        try:
            self.gpu.make_current()
            for stream in (self.stream, self.reading):
                self.gpu.driver.synchronize(stream)
        except (CudaError, EngineError):
            pass  # lost: whoever waited has got the error
        closed()

    def destroy(self) -> None:
        """Destroy the streams. Nobody uses this device any more."""
        self.gpu.clock.remove(self._meter)
        self.gpu.make_current()
        for stream in (self.stream, self.reading):
            self.gpu.driver.destroy_stream(stream)

"""One GPU: its context, its memory, events and clock, the GPUs it can access, and whether it is lost.

A process has one `Gpu` for each GPU, shared by its pipelines, so that caches can move from one to another.
"""

import threading
from functools import partial

from stageline.models.errors import EngineError
from stageline.runtime.devices.cuda.clock import Clock
from stageline.runtime.devices.cuda.driver import CudaError, Driver
from stageline.runtime.devices.cuda.events import Event, Events
from stageline.runtime.devices.cuda.pools import Pool


class Gpu:
    """Shared by the stages on it. Thread-safe; owns its pools and events, and a share of the GPU's primary context."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """CudaError if the GPU cannot be used."""
        self.driver, self.ordinal = driver, ordinal
        self.context = driver.retain(ordinal)
        self._events = Events(driver)
        self.clock = Clock()
        self.memory = Pool(driver.allocate, driver.free)
        self.pinned = Pool(driver.allocate_host, driver.free_host)
        self._lock = threading.Lock()  # guards `_reaches`
        self._reaches: dict[int, bool] = {}
        self._lost: str | None = None

    @property
    def name(self) -> str:
        """The name that users write."""
        return f"cuda:{self.ordinal}"

    @property
    def why_lost(self) -> str | None:
        """Why nothing is computed on it any more, if so."""
        return self._lost

    @property
    def lost(self) -> bool:
        """Whether it had an error that CUDA cannot recover from."""
        return self._lost is not None

    def make_current(self) -> None:
        """Make this GPU's context current in this thread, before any other call to it. EngineError if the GPU is
        lost."""
        if self._lost is not None:
            raise EngineError(self._lost)
        self.driver.make_current(self.context)

    def record(self, stream: int) -> Event:
        """An event at the end of the work in one of this GPU's streams."""
        return self._events.record(stream)

    def reaches(self, other: "Gpu") -> bool:
        """Whether this GPU can read the other's memory directly; the first call enables that."""
        with self._lock:
            if other.ordinal not in self._reaches:
                reaches = self.driver.can_reach(self.ordinal, other.ordinal)
                if reaches:
                    self.driver.make_current(self.context)
                    self.driver.enable_peer(other.context)
                self._reaches[other.ordinal] = reaches
            return self._reaches[other.ordinal]

    def failed(self, where: str, error: CudaError) -> EngineError:
        """The error that callers see. After one that CUDA cannot recover from, the GPU counts as lost."""
        if error.sticky and self._lost is None:
            seen = f"{error} (first seen in {where})"
            self._lost = f"{self.name} is lost after {seen}; close the pipeline and restart the process"
        if self._lost is not None:
            return EngineError(self._lost)
        if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
            held = (self.memory.held_bytes / 1e9, self.pinned.held_bytes / 1e9)
            return EngineError(
                f"{where}: no memory on {self.name} ({held[0]:.2f} GB of buffers there, {held[1]:.2f} GB pinned); open "
                "with fewer slots, a smaller capacity or smaller micro-batches"
            )
        return EngineError(f"{where} failed on {self.name}: {error}")

    def close(self) -> None:
        """Free everything. No work may be running, no buffer in use, and the GPU not lost."""
        self.driver.make_current(self.context)
        for release in (
            self._events.close,
            self.memory.close,
            self.pinned.close,
            partial(self.driver.release, self.ordinal),
        ):
            release()


_lock = threading.Lock()  # guards the next line
_open: dict[tuple[int, int], tuple[Gpu, int]] = {}  # (driver, ordinal) -> the GPU, and its number of users


def acquire(driver: Driver, ordinal: int) -> Gpu:
    """The process's GPU of this number, until `release`. CudaError if it cannot be used."""
    with _lock:
        key = (id(driver), ordinal)
        gpu, users = _open.get(key) or (Gpu(driver, ordinal), 0)
        _open[key] = (gpu, users + 1)
        return gpu


def release(gpu: Gpu) -> None:
    """Release the GPU; the last release frees everything."""
    with _lock:
        key = (id(gpu.driver), gpu.ordinal)
        _, users = _open[key]
        if users > 1:
            _open[key] = (gpu, users - 1)
            return
        del _open[key]
    gpu.close()

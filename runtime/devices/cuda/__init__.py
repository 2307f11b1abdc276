"""GPUs as devices: streams, events, memory from pools, copies, graphs."""

import threading
from collections.abc import Sequence
from contextlib import suppress

from stageline.models.errors import EngineError, RequestError
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError, Driver, load
from stageline.runtime.devices.cuda.gpu import Gpu, acquire, release

__all__ = ["CudaDevice", "open_gpus"]


def open_gpus(
    stages: Sequence[tuple[int, int]], cores: tuple[int, ...], driver: Driver | None = None
) -> list[CudaDevice]:
    """A device for each (stage, ordinal of its GPU). All are freed when the last of them is closed; a GPU is released
    with its last device in the process.

    `driver`: None for this machine's. RequestError for a GPU that does not exist, EngineError without a driver.
    """
    if driver is None:
        driver = load()
    count = driver.count()
    for stage, ordinal in stages:
        if not 0 <= ordinal < count:
            there = ", ".join(f"cuda:{number}" for number in range(count))
            raise RequestError(f"stage {stage} was to run on cuda:{ordinal}; this machine has {there}")
    group = _StageGroup()
    try:
        for stage, ordinal in stages:
            if ordinal not in group.gpus:
                group.gpus[ordinal] = acquire(driver, ordinal)
            group.devices.append(CudaDevice(group.gpus[ordinal], stage, cores, group.closed))
    except (CudaError, EngineError) as error:
        group.close()
        raise EngineError(f"cuda:{ordinal} cannot be used: {error}") from error
    group.left = len(group.devices)
    return list(group.devices)


class _StageGroup:
    """The stages of one pipeline on GPUs. They read each other's memory, so all are freed when the last is closed."""

    def __init__(self) -> None:
        self.gpus: dict[int, Gpu] = {}
        self.devices: list[CudaDevice] = []
        self.left = 0
        self._lock = threading.Lock()

    def closed(self) -> None:
        """One of the devices was closed."""
        with self._lock:
            self.left -= 1
            last = self.left == 0
        if last:
            self.close()

    def close(self) -> None:
        """Free everything, or nothing if a GPU is lost: its copies may never end, and the process frees all."""
        if any(gpu.lost for gpu in self.gpus.values()):
            return
        with suppress(CudaError, EngineError):  # it may be lost now
            for device in self.devices:
                device.destroy()
            for gpu in self.gpus.values():
                release(gpu)

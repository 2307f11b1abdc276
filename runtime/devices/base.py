"""Where a stage runs, and arrays that lie there: the contract between the lanes and what they run on."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class HostCopy(Protocol):
    """A copy to host memory that is under way."""

    def wait(self) -> Array:
        """The copy, once it is done: a new array that the caller owns, half precision widened to float32.

        EngineError if the device failed before.
        """
        ...


class DeviceArray(Protocol):
    """An array in a device's memory, whole once the work that makes it is done; nobody waits for that to pass it on.

    Whoever holds it keeps its memory; nothing writes to it any more.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self) -> HostCopy:
        """Begin to copy it to host memory, behind the work that makes it."""
        ...


Value: TypeAlias = Array | DeviceArray
"""What goes from stage to stage."""


class Device(Protocol):
    """What one stage runs on: some processors, or a stream of a GPU. The lane that it was made for owns it."""

    @property
    def name(self) -> str:
        """As users write it: `cpu`, `cuda:0`."""
        ...

    @property
    def cores(self) -> tuple[int, ...]:
        """The processors that the stage's worker may use."""
        ...

    def start_worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a thread that may run engines on this device, and `work` on it. The caller owns the thread."""
        ...

    def busy_s(self) -> float | None:
        """Seconds that the device has computed by its own clock; None where the worker's time is the device's."""
        ...

    def close(self) -> None:
        """Let go of what the device holds, after the engines on it. May be called again."""
        ...


def on_host(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Array]:
    """The named values as arrays in host memory; waits for those that lie on a device."""
    found = {name: values[name] for name in names}
    copies = {name: value.read() for name, value in found.items() if not isinstance(value, np.ndarray)}
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return arrays | {name: copy.wait() for name, copy in copies.items()} if copies else arrays

"""Devices that run stages, and arrays in their memory: the contract between the lanes and the devices."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class HostCopy(Protocol):
    """A running copy to host memory."""

    def wait(self) -> Array:
        """The copy, once it is done: a new array that the caller owns, half precision widened to float32.

        EngineError if the device failed before.
        """
        ...


class DeviceArray(Protocol):
    """An array in a device's memory, complete once the work that computes it is done. It is passed on before that.

    Whoever holds it keeps its memory alive; nothing writes to it any more.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self) -> HostCopy:
        """Start a copy to host memory, after the work that computes it."""
        ...


Value: TypeAlias = Array | DeviceArray
"""What passes from stage to stage."""


class Device(Protocol):
    """What one stage runs on: some cores, or a stream of a GPU. Its lane owns it."""

    @property
    def name(self) -> str:
        """As users write it: `cpu`, `cuda:0`."""
        ...

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores that the stage's worker may use."""
        ...

    @property
    def step_tokens(self) -> int:
        """How many tokens are enough for a step: with fewer its time hardly falls, since it reads all weights."""
        ...

    def start_worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a thread that may run engines on this device, and run `work` in it. The caller owns the thread."""
        ...

    def busy_s(self) -> float | None:
        """Seconds that the device has computed by its own clock, of which stages at work at the same time on one GPU
        have equal parts; None if the worker's time is the device's."""
        ...

    @property
    def lost(self) -> str | None:
        """Why nothing can be computed on it any more, if so."""
        ...

    def close(self) -> None:
        """Release what the device holds, after the engines on it. May be called again."""
        ...


def on_host(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Array]:
    """The named values as arrays in host memory; waits for those on a device."""
    found = {name: values[name] for name in names}
    copies = {name: value.read() for name, value in found.items() if not isinstance(value, np.ndarray)}
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return arrays | {name: copy.wait() for name, copy in copies.items()} if copies else arrays

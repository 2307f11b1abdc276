"""Values of a stage that another process computes."""

from concurrent.futures import Future
from typing import Any

import numpy as np
from stageline.runtime.cluster.wire import Frame
from stageline.runtime.devices.base import Array


class RemoteArray:
    """An output of a step that a host was asked for. Keeps the promises of `DeviceArray`, and of `HostCopy`: it is on
    its way here from the beginning."""

    __slots__ = ("_answer", "_place")

    def __init__(self, answer: "Future[Frame]", place: int) -> None:
        """It is the array at `place` of the answer."""
        self._answer, self._place = answer, place

    @property
    def shape(self) -> tuple[int, ...]:
        """Known once it is here: this waits."""
        return self.wait().shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Known once it is here: this waits."""
        return self.wait().dtype

    def read(self) -> "RemoteArray":
        """See `DeviceArray.read`."""
        return self

    def wait(self) -> Array:
        """See `HostCopy.wait`. EngineError if the host could not compute it, StageLostError if it is gone."""
        return self._answer.result().arrays[self._place]

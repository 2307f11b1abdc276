"""Events mark points in streams. Their handles are reused when nobody holds them any more."""

from collections import deque

from stageline.runtime.devices.cuda.driver import Driver

# Handles are made so many at once: how many are held at a time varies with how the threads are scheduled, and a step
# should not have to ask the driver for one more.
_BATCH = 64


class Event:
    """A recorded point in `stream`. A wait refers to the point as recorded when the wait was enqueued, so the handle
    may be recorded again as soon as this object is gone."""

    __slots__ = ("_driver", "_returned", "handle", "stream")

    def __init__(self, driver: Driver, handle: int, stream: int, returned: deque[int]) -> None:
        self._driver, self.handle, self.stream, self._returned = driver, handle, stream, returned

    def done(self) -> bool:
        """Whether the stream has reached this point. CudaError if the device failed."""
        return self._driver.done(self.handle)

    def wait(self) -> None:
        """Let the host wait until the stream reaches this point. CudaError if the device failed."""
        self._driver.synchronize_event(self.handle)

    def seconds_since(self, began: "Event") -> float:
        """Device time between two events that have happened."""
        return self._driver.elapsed_s(began.handle, self.handle)

    def __del__(self) -> None:
        self._returned.append(self.handle)  # on any thread


class Events:
    """The events of one GPU. Thread-safe; owns them until `close()`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._returned: deque[int] = deque()
        self._made: list[int] = []

    def record(self, stream: int) -> Event:
        """An event at the end of the stream's work. The GPU's context must be current in this thread."""
        try:
            handle = self._returned.popleft()
        except IndexError:
            handle, *others = (self._driver.new_event() for _ in range(_BATCH))
            self._made += [handle, *others]
            self._returned.extend(others)
        event = Event(self._driver, handle, stream, self._returned)
        self._driver.record(handle, stream)
        return event

    @property
    def made(self) -> int:
        """Number of events that were made."""
        return len(self._made)

    def close(self) -> None:
        """Destroy all events; none may be in use."""
        made, self._made = self._made, []
        for handle in made:
            self._driver.destroy_event(handle)

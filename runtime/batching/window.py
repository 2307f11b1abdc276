"""A window: N may be inside at a time, the others wait for their turn. Nobody's thread waits."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Window(Generic[T]):
    """Lets in `size` at a time, in the order in which they come, by calling `admit`, which must neither block nor call
    back. Thread-safe."""

    def __init__(self, size: int, admit: Callable[[T], None]) -> None:
        self._admit = admit
        self._lock = threading.Lock()  # guards the rest, and the order of admissions
        self._free = size
        self._waiting: deque[T] = deque()

    def enter(self, one: T) -> None:
        """Let it in, now or when its turn has come."""
        with self._lock:
            if self._free:
                self._free -= 1
                self._admit(one)
            else:
                self._waiting.append(one)

    def leave(self) -> None:
        """One that was let in has left: the next one may come."""
        with self._lock:
            if self._waiting:
                self._admit(self._waiting.popleft())
            else:
                self._free += 1

"""Pools of memory: blocks of few sizes, which are reused when nobody holds them and no work uses them.

    free ──take()──> in use ──the last reference goes──> returned ──all guards have happened──> free
                     (a Buffer)

A guard is an event of a stream that reads or writes the block. So a block is never reused or freed while a copy or a
kernel still uses it, and the host never waits for that. In the steady state every `take` finds a free block.
"""

import threading
from collections import deque
from collections.abc import Callable

from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.events import Event

_MIN_BYTES = 256  # the alignment of device memory
LARGE_BYTES = 64 * 2**20
_PAGE_BYTES = 2 * 2**20  # what CUDA maps device memory in


def size_class(size_bytes: int) -> int:
    """The size of a new block for a buffer: 4, 5, 6 or 7 quarters of a power of two, of which at most a fifth is
    unused; for large ones, such as caches, whole pages."""
    if size_bytes <= _MIN_BYTES:
        return _MIN_BYTES
    step = 1 << max((size_bytes - 1).bit_length() - 3, 6) if size_bytes <= LARGE_BYTES else _PAGE_BYTES
    return -(-size_bytes // step) * step


class Buffer:
    """A block in use, owned by whoever holds this object. `guards`: the last event of each stream that worked on it, as
    each thread recorded it: of two threads' events in one stream, the later one may be written down first."""

    __slots__ = ("_returned", "address", "guards", "size_bytes")

    def __init__(self, address: int, size_bytes: int, returned: "deque[tuple[int, int, tuple[Event, ...]]]") -> None:
        self.address, self.size_bytes = address, size_bytes
        self.guards: dict[tuple[int, int], Event] = {}
        self._returned = returned

    def guard(self, event: Event) -> None:
        """Keep the block until the event has happened."""
        self.guards[event.stream, threading.get_ident()] = event

    def __del__(self) -> None:
        # Runs on any thread, at any moment: only appending is safe.
        self._returned.append((self.address, self.size_bytes, tuple(self.guards.values())))


class Pool:
    """Blocks made by `allocate` and freed by `free`. Thread-safe; owns the blocks until `close()`."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate, self._release = allocate, free
        self._lock = threading.Lock()  # guards the rest, except `_returned`
        self._returned: deque[tuple[int, int, tuple[Event, ...]]] = deque()
        self._waiting: dict[int, deque[tuple[int, tuple[Event, ...]]]] = {}
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        self.allocations = 0
        """Number of allocations since the pool was made."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self._sizes.values())

    def take(self, size_bytes: int) -> Buffer:
        """A buffer of at least `size_bytes`, with arbitrary contents. CudaError if there is no memory."""
        size = size_class(size_bytes)
        with self._lock:
            self._sort()
            for fitting in self._fitting(size):
                free = self._free.setdefault(fitting, [])
                if not free:
                    self._reclaim(fitting)
                if free:
                    return Buffer(free.pop(), fitting, self._returned)
            return Buffer(self._new(size), size, self._returned)

    def close(self) -> None:
        """Free all blocks, including those in use: neither callers nor the device may use a buffer any more."""
        with self._lock:
            sizes, self._sizes = self._sizes, {}
            self._free, self._waiting = {}, {}
            for address in sizes:
                self._release(address)

    def _fitting(self, size: int) -> list[int]:
        """The sizes of blocks that may serve for `size`, the best first: large ones may be a quarter larger."""
        if size <= LARGE_BYTES:
            return [size]
        return sorted({other for other in self._sizes.values() if size <= other <= size * 5 // 4})

    def _sort(self) -> None:
        while self._returned:
            address, size, guards = self._returned.popleft()
            if address in self._sizes:  # else the pool was closed
                self._waiting.setdefault(size, deque()).append((address, guards))

    def _reclaim(self, size: int) -> None:
        waiting = self._waiting.get(size, deque())
        for _ in range(len(waiting)):
            address, guards = waiting.popleft()
            if all(guard.done() for guard in guards):
                self._free.setdefault(size, []).append(address)
            else:
                waiting.append((address, guards))

    def _new(self, size: int) -> int:
        self.allocations += 1
        try:
            address = self._allocate(size)
        except CudaError as error:
            if error.name != "CUDA_ERROR_OUT_OF_MEMORY" or not self._trim():
                raise
            address = self._allocate(size)
        self._sizes[address] = size
        return address

    def _trim(self) -> bool:
        """Free the blocks that are not in use, and return whether there were any."""
        for size in list(self._waiting):
            self._reclaim(size)
        blocks = [address for free in self._free.values() for address in free]
        for free in self._free.values():
            free.clear()
        for address in blocks:
            del self._sizes[address]
            self._release(address)
        return bool(blocks)

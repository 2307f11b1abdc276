"""A fake CUDA driver: GPUs whose memory is this process's, and whose streams run when it suits them.

It keeps the Protocol of stageline.runtime.devices.cuda.driver and writes down every call. Work is done as late as it
may be (`seed` None: only when the host waits for it), or at random moments. It looks for what a real GPU would punish
now and then: two streams that touch the same memory with no event between them, memory freed under a copy, a handle
used under another context, a stream that is waited for while it is captured.
"""

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stageline.runtime.devices.cuda.driver import CudaError

KERNEL_S = 1e-3
_FIRST_CONTEXT = 1000


class HazardError(AssertionError):
    """What works on most days on a real GPU."""


@dataclass(eq=False)
class _Record:
    """An event as it was recorded once: `clock` is how far each stream has come then, for sure."""

    stream: int
    clock: dict[int, int]
    done: bool = False
    at_s: float = 0.0


@dataclass(eq=False)
class _Operation:
    run: Callable[[], None]
    waits_for: _Record | None = None
    blocks: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Stream:
    ordinal: int
    operations: deque[_Operation] = field(default_factory=deque)
    enqueued: int = 0
    clock: dict[int, int] = field(default_factory=dict)
    captured: "list[Callable[[], None]] | None" = None


@dataclass(eq=False)
class _Block:
    """An allocation, and which operations (stream, number in it) touched it last."""

    array: Any
    address: int
    size: int
    ordinal: int | None  # None: pinned host memory
    wrote: tuple[int, int] | None = None
    read: dict[int, int] = field(default_factory=dict)


class FakeDriver:
    """`gpus` of them, of compute `capability`; `reach`: pairs (ordinal, other) where the first reads the other's memory
    itself."""

    def __init__(
        self,
        gpus: int = 1,
        reach: Iterable[tuple[int, int]] = (),
        seed: int | None = None,
        capability: tuple[int, int] = (8, 9),
    ) -> None:
        self._gpus, self._reach, self._capability = gpus, frozenset(reach), capability
        self._random = None if seed is None else random.Random(seed)
        self._lock = threading.RLock()
        self._local = threading.local()
        self._handles = iter(range(1, 1 << 60))
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, tuple[int, _Record | None]] = {}
        self._blocks: dict[int, _Block] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._enabled: set[tuple[int, int]] = set()
        self._known: dict[int, int] = {}  # how far the host knows each stream to have come
        self._contexts: Counter[int] = Counter()
        self._failures: dict[str, list[tuple[int, str]]] = {}
        self._lost: set[int] = set()
        self._time_s = 0.0
        self.calls: list[tuple[Any, ...]] = []
        self.ranges = 0
        """Profiler ranges that are open."""

    # What tests ask and arrange.

    def count_of(self, *names: str) -> int:
        """How often these calls were made."""
        with self._lock:
            return sum(call[0] in names for call in self.calls)

    def fail(self, call: str, error: str, after: int = 0) -> None:
        """Let a call fail once, after it was made `after` times more. A sticky error loses the GPU."""
        self._failures.setdefault(call, []).append((after, error))

    @property
    def live_blocks(self) -> int:
        """Allocations that were not freed."""
        return len(self._blocks)

    @property
    def live_handles(self) -> int:
        """Streams, events, graphs and contexts that were not given back."""
        return len(self._streams) + len(self._events) + len(self._graphs) + sum(self._contexts.values())

    def kernel(
        self,
        stream: int,
        reads: Iterable[int],
        writes: Iterable[int],
        run: Callable[[], None],
    ) -> None:
        """Enqueue work that touches the allocations at these addresses (or around them)."""
        self._enqueue("kernel", stream, run, list(reads), list(writes))

    def array(self, address: int, size: int) -> Any:
        """The bytes of an allocation, from `address` on."""
        block = self._block(address)
        start = address - block.address
        if start + size > block.size:
            raise HazardError(f"{size} bytes at {address:#x} go over the end of an allocation of {block.size}")
        return block.array[start : start + size]

    # Driver.

    def count(self) -> int:
        return self._gpus

    def name(self, ordinal: int) -> str:
        return f"made-up GPU {ordinal}"

    def capability(self, ordinal: int) -> tuple[int, int]:
        return self._capability

    def retain(self, ordinal: int) -> int:
        self._called("retain", ordinal)
        self._contexts[ordinal] += 1
        return _FIRST_CONTEXT + ordinal

    def release(self, ordinal: int) -> None:
        self._called("release", ordinal)
        self._contexts[ordinal] -= 1

    def make_current(self, context: int) -> None:
        self._local.ordinal = context - _FIRST_CONTEXT

    def allocate(self, size: int) -> int:
        return self._new_block("allocate", size, self._current())

    def free(self, address: int) -> None:
        self._free("free", address)

    def allocate_host(self, size: int) -> int:
        self._current()
        return self._new_block("allocate_host", size, None)

    def free_host(self, address: int) -> None:
        self._free("free_host", address)

    def new_stream(self) -> int:
        with self._lock:
            ordinal = self._current()
            handle = next(self._handles)
            self._called("new_stream", handle)
            self._streams[handle] = _Stream(ordinal)
            return handle

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            self._called("destroy_stream", stream)
            self._stream(stream)
            self._run_all(stream)
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with self._lock:
            self._called("synchronize", stream)
            if self._stream(stream).captured is not None:
                raise CudaError("synchronize", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            self._run_all(stream)

    def new_event(self) -> int:
        with self._lock:
            ordinal = self._current()
            handle = next(self._handles)
            self._called("new_event", handle)
            self._events[handle] = (ordinal, None)
            return handle

    def destroy_event(self, event: int) -> None:
        with self._lock:
            self._called("destroy_event", event)
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._called("record", event, stream)
            owner = self._stream(stream)
            ordinal, _ = self._events[event]
            if ordinal != owner.ordinal:
                raise CudaError("record", "CUDA_ERROR_INVALID_HANDLE")
            record = _Record(stream, {})
            self._events[event] = (ordinal, record)

            def happen() -> None:
                record.done, record.at_s = True, self._time_s

            self._enqueue(None, stream, happen)
            record.clock = dict(owner.clock)

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            self._called("wait", stream, event)
            record = self._events[event][1]
            owner = self._stream(stream, any_context=True)
            if record is None:
                return
            owner.operations.append(_Operation(lambda: None, record))
            for other, place in record.clock.items():
                owner.clock[other] = max(owner.clock.get(other, 0), place)

    def done(self, event: int) -> bool:
        with self._lock:
            self._called("done", event)
            self._tick()
            record = self._events[event][1]
            if record is not None and record.done:
                self._learn(record)
            return record is None or record.done

    def synchronize_event(self, event: int) -> None:
        with self._lock:
            self._called("synchronize_event", event)
            record = self._events[event][1]
            if record is not None:
                self._run_until(record)
                self._learn(record)

    def elapsed_s(self, began: int, ended: int) -> float:
        with self._lock:
            self._called("elapsed_s", began, ended)
            first, last = self._events[began][1], self._events[ended][1]
            assert first is not None
            assert last is not None
            if not (first.done and last.done):
                raise CudaError("elapsed_s", "CUDA_ERROR_NOT_READY")
            return last.at_s - first.at_s

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        self._copy("upload", target, source, size, stream, target_is_host=False, source_is_host=True)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        self._copy("download", target, source, size, stream, target_is_host=True, source_is_host=False)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._copy("copy", target, source, size, stream, target_is_host=False, source_is_host=False)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int, stream: int) -> None:
        assert width <= pitch

        def run() -> None:
            for row in range(rows):
                moved = self.array(source + row * pitch, width).copy()
                self.array(target + row * pitch, width)[:] = moved

        self._enqueue("copy_rows", stream, run, [source], [target])

    def copy_peer(self, target: int, to_context: int, source: int, context: int, size: int, stream: int) -> None:
        there, here = context - _FIRST_CONTEXT, to_context - _FIRST_CONTEXT
        if (here, there) not in self._enabled:
            raise HazardError(f"a peer copy from GPU {there} to GPU {here}, which was not allowed to reach it")
        if (self._block(source).ordinal, self._block(target).ordinal) != (there, here):
            raise HazardError("a peer copy between other GPUs than those message")

        def run() -> None:
            self.array(target, size)[:] = self.array(source, size)

        self._enqueue("copy_peer", stream, run, [source], [target])

    def zero(self, target: int, size: int, stream: int) -> None:
        def run() -> None:
            self.array(target, size)[:] = 0

        self._enqueue("zero", stream, run, [], [target])

    def can_reach(self, ordinal: int, other: int) -> bool:
        self._called("can_reach", ordinal, other)
        return (ordinal, other) in self._reach

    def enable_peer(self, context: int) -> None:
        self._called("enable_peer", context)
        self._enabled.add((self._current(), context - _FIRST_CONTEXT))

    def begin_capture(self, stream: int) -> None:
        with self._lock:
            self._called("begin_capture", stream)
            self._stream(stream).captured = []
            self._local.capturing = True

    def end_capture(self, stream: int) -> int:
        with self._lock:
            owner = self._stream(stream)
            assert owner.captured is not None
            work, owner.captured = owner.captured, None
            self._local.capturing = False
            self._called("end_capture", stream)  # the capture is over, even if this fails
            handle = next(self._handles)
            self._graphs[handle] = work
            return handle

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            self._called("launch", graph, stream)
            for enqueue in self._graphs[graph]:
                enqueue()

    def destroy_graph(self, graph: int) -> None:
        self._called("destroy_graph", graph)
        del self._graphs[graph]

    def push_range(self, name: str) -> None:
        with self._lock:
            self.calls.append(("push_range", name))
            self.ranges += 1

    def pop_range(self) -> None:
        with self._lock:
            self.ranges -= 1

    # How it works.

    def _called(self, name: str, *arguments: Any) -> None:
        with self._lock:
            self.calls.append((name, *arguments))
            current = getattr(self._local, "ordinal", None)
            if current in self._lost:
                raise CudaError(name, "CUDA_ERROR_ILLEGAL_ADDRESS")
            for place, (after, error) in enumerate(self._failures.get(name, [])):
                if after == 0:
                    del self._failures[name][place]
                    failure = CudaError(name, error)
                    if failure.sticky:
                        self._lost.add(current or 0)
                    raise failure
                self._failures[name][place] = (after - 1, error)

    def _current(self) -> int:
        ordinal = getattr(self._local, "ordinal", None)
        if ordinal is None:
            raise CudaError("(any call)", "CUDA_ERROR_INVALID_CONTEXT")
        if not self._contexts[ordinal]:
            raise CudaError("(any call)", "CUDA_ERROR_CONTEXT_IS_DESTROYED")
        return int(ordinal)

    def _stream(self, handle: int, any_context: bool = False) -> _Stream:
        if handle not in self._streams:
            raise HazardError(f"stream {handle} is used after it was destroyed")
        stream = self._streams[handle]
        if not any_context and stream.ordinal != self._current():
            raise CudaError("(a stream)", "CUDA_ERROR_INVALID_CONTEXT")
        return stream

    def _block(self, address: int) -> _Block:
        with self._lock:
            for block in self._blocks.values():
                if block.address <= address < block.address + block.size:
                    return block
        raise HazardError(f"{address:#x} is in no allocation")

    def _new_block(self, call: str, size: int, ordinal: int | None) -> int:
        with self._lock:
            self._called(call, size)
            if getattr(self._local, "capturing", False):
                raise CudaError(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            raw = np.full(size + 256, 0xA5, np.uint8)
            skipped = -raw.ctypes.data % 256
            address = raw.ctypes.data + skipped
            self._blocks[address] = _Block(raw[skipped : skipped + size], address, size, ordinal)
            return address

    def _free(self, call: str, address: int) -> None:
        with self._lock:
            self._called(call, address)
            for stream in self._streams.values():
                if any(address in operation.blocks for operation in stream.operations):
                    raise HazardError(f"{address:#x} is freed while work on it is running")
            self._blocks.pop(address).array[:] = 0xDD

    def _copy(
        self, call: str, target: int, source: int, size: int, stream: int, target_is_host: bool, source_is_host: bool
    ) -> None:
        here = self._stream(stream).ordinal
        for address, is_host in ((target, target_is_host), (source, source_is_host)):
            ordinal = self._block(address).ordinal
            if (ordinal is None) != is_host or (not is_host and ordinal != here):
                raise HazardError(f"{call} touches memory of {ordinal} in a stream of GPU {here}")

        def run() -> None:
            self.array(target, size)[:] = self.array(source, size)

        self._enqueue(call, stream, run, [source], [target])

    def _enqueue(
        self,
        call: str | None,
        stream: int,
        run: Callable[[], None],
        reads: "list[int] | tuple[()]" = (),
        writes: "list[int] | tuple[()]" = (),
    ) -> None:
        with self._lock:
            if call is not None:
                self._called(call, stream)
            owner = self._stream(stream)
            if owner.captured is not None:
                owner.captured.append(lambda: self._enqueue(None, stream, run, reads, writes))
                return
            owner.enqueued += 1
            for other, place in self._known.items():
                owner.clock[other] = max(owner.clock.get(other, 0), place)
            owner.clock[stream] = owner.enqueued
            read, written = [self._block(a) for a in reads], [self._block(a) for a in writes]
            for block in read:
                self._check_order(block, owner, stream, call, writes=False)
                block.read[stream] = owner.enqueued
            for block in written:
                self._check_order(block, owner, stream, call, writes=True)
                block.wrote, block.read = (stream, owner.enqueued), {}

            def timed() -> None:
                if reads or writes:
                    self._time_s += KERNEL_S
                run()

            owner.operations.append(_Operation(timed, blocks=frozenset(block.address for block in (*read, *written))))
            self._tick()

    def _check_order(self, block: _Block, owner: _Stream, stream: int, call: str | None, writes: bool) -> None:
        before = [block.wrote] if block.wrote else []
        if writes:
            before += list(block.read.items())
        for other, place in before:
            if owner.clock.get(other, 0) < place:
                raise HazardError(
                    f"{call} in stream {stream} touches {block.address:#x}, which operation {place} of stream {other} "
                    "uses, and no event says that it is done"
                )

    def _learn(self, record: _Record) -> None:
        for stream, place in record.clock.items():
            self._known[stream] = max(self._known.get(stream, 0), place)

    def _tick(self) -> None:
        """Time passes."""
        if self._random is None:
            return
        for _ in range(self._random.randrange(4)):
            waiting = [s for s in self._streams.values() if s.operations]
            if waiting:
                self._step(self._random.choice(waiting))

    def _step(self, stream: _Stream) -> bool:
        operation = stream.operations[0]
        if operation.waits_for is not None and not operation.waits_for.done:
            return False
        stream.operations.popleft()
        operation.run()
        return True

    def _run_until(self, record: _Record) -> None:
        while not record.done:
            stream = self._streams[record.stream]
            if not self._step(stream):
                waits_for = stream.operations[0].waits_for
                assert waits_for is not None
                self._run_until(waits_for)

    def _run_all(self, handle: int) -> None:
        stream = self._streams[handle]
        while stream.operations:
            if not self._step(stream):
                waits_for = stream.operations[0].waits_for
                assert waits_for is not None
                self._run_until(waits_for)
        self._known[handle] = stream.enqueued

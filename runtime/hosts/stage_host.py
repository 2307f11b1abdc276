"""A stage's host: a process that opens stages of the bundle on its disk for a pipeline elsewhere, and runs them.

    listener ── accepts ──> session: handshake ──> welcome ──> frames ──> inbox ──> worker: engine ──> answers
                               └── refused: no proof, an epoch before the last one, too many at a time

A session is one stage, and ends with its connection, or when a pipeline of a later epoch comes. Who connects gets no
memory and no thread for longer than `handshake.HANDSHAKE_S` before it has proved that it knows the key.
"""

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from time import perf_counter

import numpy as np
from pydantic import ValidationError
from stageline.models.errors import EngineError, RequestError, StagelineError, WireError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import NEW_LENGTHS, PAST_LENGTHS
from stageline.runtime.cluster import handshake
from stageline.runtime.cluster.addresses import listen
from stageline.runtime.cluster.messages import (
    Copy,
    Done,
    Failed,
    Kind,
    Open,
    Opened,
    Run,
    Step,
    Welcome,
    stageline_version,
)
from stageline.runtime.cluster.wire import Frame, Wire
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import Array, Device, Value, on_host
from stageline.runtime.engines.base import CacheSize, Engine, PackedRows
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.opening import Opener
from stageline.runtime.validation import first_error

MOST_SESSIONS = 64
"""Connections at a time, those that have not proved anything yet included."""
log = logging.getLogger("stageline.cluster")


class StageHost:
    """Serves stages of `bundle`, on `device` and `threads` cores (None: all of this process), until `close()`."""

    def __init__(self, bundle: Bundle, address: tuple[str, int], key: bytes, device: str, threads: int | None) -> None:
        """Listen at `address` (port 0: any free one), at once. RequestError if that cannot be, or the device is not
        there; EngineError without its driver."""
        self.bundle, self.device, self.threads = bundle, device, threads
        self.digest = bundle.digest()
        self._key = key
        self._epoch = 0
        self._sessions: set[_Session] = set()
        self._lock = threading.Lock()  # guards the two above
        for found in open_devices([device], threads):
            found.close()
        self._listener = listen(address)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    def serve(self) -> None:
        """Accept pipelines until `close`."""
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return  # closed
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                room = len(self._sessions) < MOST_SESSIONS
                if room:
                    session = _Session(self, connection, f"{peer[0]}:{peer[1]}")
                    self._sessions.add(session)
            if room:
                session.start()
            else:
                connection.close()

    def close(self) -> None:
        """Accept nobody any more, and end all sessions; returns when their engines are closed. May be called again."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.end()
        for session in sessions:
            session.join()

    def greet(self, connection: socket.socket) -> tuple[Wire, int]:
        """The handshake with who connected."""
        return handshake.answer(connection, self._key)

    def begin(self, session: "_Session", epoch: int) -> None:
        """A session of this epoch begins; those of earlier ones are ended first. RequestError if it is earlier."""
        with self._lock:
            if epoch < self._epoch:
                raise RequestError(
                    f"this host serves a pipeline that was opened later (epoch {self._epoch}, not {epoch})"
                )
            self._epoch = epoch
            earlier = [other for other in self._sessions if other.epoch is not None and other.epoch < epoch]
        for other in earlier:
            log.info("%s: a pipeline that was opened later takes over", other.peer)
            other.end()
        for other in earlier:
            other.join()

    def ended(self, session: "_Session") -> None:
        """A session has ended."""
        with self._lock:
            self._sessions.discard(session)


class _Session:
    """A connection, from its acceptance to its end, and the stage that it opens."""

    def __init__(self, host: StageHost, connection: socket.socket, peer: str) -> None:
        self.peer = peer
        self.epoch: int | None = None
        self._host, self._connection = host, connection
        self._wire: Wire | None = None
        self._inbox: SimpleQueue[Frame | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=f"session-{peer}", daemon=True)

    def start(self) -> None:
        """Begin with the handshake, on a thread of its own."""
        self._thread.start()

    def end(self) -> None:
        """End the connection; a step that runs is finished first. May be called again."""
        if self._wire is not None:
            self._wire.close()
        else:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait until its engine is closed."""
        self._thread.join()

    def _live(self) -> None:
        device: Device | None = None
        worker: threading.Thread | None = None
        try:
            self._wire, epoch = self._host.greet(self._connection)
            try:
                self._host.begin(self, epoch)
                self.epoch = epoch
                (device,) = open_devices([self._host.device], self._host.threads)
            except StagelineError as error:
                self._wire.send(Kind.FAILED, Failed(error=str(error)).model_dump())
                raise
            self._wire.send(Kind.WELCOME, Welcome(device=device.name, step_tokens=device.step_tokens).model_dump())
            work = _Stage(self._host, self._wire, device, self._inbox)
            worker = device.start_worker("stage", work.live)
            while True:
                self._inbox.put(self._wire.receive())
        except StagelineError as error:
            log.info("%s: %s", self.peer, error)
        finally:
            self._inbox.put(None)
            if worker is not None:
                worker.join()
            if device is not None:
                device.close()
            if self._wire is not None:
                self._wire.close()
            self._connection.close()
            self._host.ended(self)


class _Stage:
    """The stage of a session, on its worker's thread."""

    def __init__(self, host: StageHost, wire: Wire, device: Device, inbox: "SimpleQueue[Frame | None]") -> None:
        self._host, self._wire, self._device, self._inbox = host, wire, device, inbox
        self._engine: Engine | None = None
        self._cache: CacheSize | None = None
        self._busy_s = 0.0
        self._failed_copy: str | None = None  # told with the next answer
        self._kinds: dict[int, Callable[[Frame], None]] = {
            Kind.OPEN: self._open,
            Kind.RUN: self._run,
            Kind.STEP: self._step,
            Kind.COPY: self._copy,
        }

    def live(self) -> None:
        """Do what comes until None does, or the connection ends."""
        try:
            for frame in iter(self._inbox.get, None):
                self._do(frame)
                del frame  # or its arrays would live until the next one comes
        except WireError:
            self._wire.close()
        finally:
            if self._engine is not None:
                self._engine.close()

    def _do(self, frame: Frame) -> None:
        try:
            does = self._kinds.get(frame.kind)
            if does is None:
                raise RequestError(f"a frame of kind {frame.kind} is none that a host takes")
            does(frame)
        except WireError:
            raise
        except BaseException as error:  # whatever an engine raises, the session lives on
            reason = first_error(error) if isinstance(error, ValidationError) else str(error)
            told = isinstance(error, (StagelineError, ValidationError))
            line = " ".join((reason if told else f"{type(error).__name__}: {reason}").split())
            if frame.kind == Kind.COPY:
                self._failed_copy = self._failed_copy or line
                return
            self._wire.send(Kind.FAILED, Failed(error=line[:2000]).model_dump())

    def _open(self, frame: Frame) -> None:
        asked = Open.model_validate(frame.message)
        if self._engine is not None:
            raise RequestError("this session has a stage already")
        if asked.stageline != stageline_version():
            raise RequestError(
                f"the pipeline is of Stageline {asked.stageline}, this host of {stageline_version()}; install the same"
            )
        if asked.bundle != self._host.digest:
            raise RequestError(
                f"the bundle {self._host.bundle.path} on this host is not the pipeline's; copy the whole folder here"
            )
        if asked.stage >= len(asked.layers):
            raise RequestError(f"there is no stage {asked.stage} of {len(asked.layers)}")
        options = PipelineOptions(**asked.options.model_dump(), devices=(self._host.device,))
        opener = Opener(self._host.bundle, options)
        with opener.recut(asked.layers) as cut:
            engine = self._engine = cut.stages[asked.stage].open(self._device)
        self._cache = opener.cache
        opened = Opened(
            input_names=engine.input_names,
            output_names=engine.output_names,
            max_rows=engine.max_rows,
            packs=engine.packs,
            block_tokens=engine.block_tokens,
        )
        self._wire.send(Kind.OPENED, opened.model_dump())

    def _run(self, frame: Frame) -> None:
        engine, asked = self._opened(), Run.model_validate(frame.message)
        began = perf_counter()
        self._answer(asked, engine.run(_named(engine, asked, frame.arrays), asked.outputs), began)

    def _step(self, frame: Frame) -> None:
        engine, asked = self._opened(), Step.model_validate(frame.message)
        if self._failed_copy is not None:
            why, self._failed_copy = self._failed_copy, None
            raise EngineError(why)
        if self._cache is None:
            raise RequestError("this stage has no caches; it runs batches")
        count = len(asked.inputs)
        inputs = _named(engine, asked, frame.arrays[:count])
        rows: int | PackedRows
        if asked.first is None:
            rows = _packed(frame.arrays[count:], self._cache, engine.block_tokens)
        else:
            rows = asked.first
            _check_range(rows, inputs, self._cache)
        began = perf_counter()
        self._answer(asked, engine.step(inputs, asked.outputs, rows), began)

    def _answer(self, asked: Run, values: Mapping[str, Value], began: float) -> None:
        outputs = on_host(values, asked.outputs)
        self._busy_s += perf_counter() - began
        self._wire.send(Kind.DONE, Done(busy_s=self._busy_s).model_dump(), [outputs[name] for name in asked.outputs])

    def _copy(self, frame: Frame) -> None:
        asked = Copy.model_validate(frame.message)
        if self._cache is None or max(asked.source, asked.target) >= self._cache.slots:
            raise RequestError(f"there are no slots {asked.source} and {asked.target} to copy between")
        self._opened().copy_slot(asked.source, asked.target, asked.tokens)

    def _opened(self) -> Engine:
        if self._engine is None:
            raise RequestError("this session has no stage yet")
        return self._engine


def _named(engine: Engine, asked: Run, arrays: tuple[Array, ...]) -> dict[str, Value]:
    """The inputs by name. RequestError where some are missing, or an output is unknown."""
    if len(arrays) != len(asked.inputs) or not set(engine.input_names) <= set(asked.inputs):
        raise RequestError(f"the stage reads {', '.join(engine.input_names)}; {', '.join(asked.inputs)} were sent")
    if not set(asked.outputs) <= set(engine.output_names):
        raise RequestError(f"the stage computes {', '.join(engine.output_names)}, not {', '.join(asked.outputs)}")
    return dict(zip(asked.inputs, arrays, strict=True))


def _packed(arrays: tuple[Array, ...], cache: CacheSize, block_tokens: int | None) -> PackedRows:
    """The rows of a step of packed tokens. RequestError where they are not within the caches: engines do not look."""
    if len(arrays) != (3 if block_tokens is None else 4) or any(array.ndim != 1 for array in arrays):
        raise RequestError("packed rows are three arrays, or four where caches are blocks, of one dimension each")
    slots, past, counts, *blocks = arrays
    fits = len({len(array) for array in (slots, past, counts)}) == 1 and all(a.dtype == np.int64 for a in arrays[:3])
    if not fits or not len(slots):
        raise RequestError("the slots, lengths and counts of packed rows are int64, one of each for a row")
    if slots.min() < 0 or slots.max() >= cache.slots or len(set(slots.tolist())) < len(slots):
        raise RequestError(f"packed rows are of slots {slots.tolist()}; there are {cache.slots}")
    if past.min() < 0 or counts.min() < 1 or (past + counts).max() > cache.capacity:
        raise RequestError(f"packed rows do not fit the capacity of {cache.capacity} tokens")
    if blocks:
        most = cache.blocks(block_tokens or 1)
        if blocks[0].dtype != np.int32 or not len(blocks[0]) or blocks[0].min() < 0 or blocks[0].max() >= most:
            raise RequestError(f"packed rows are of blocks that there are not; there are {most}")
    return PackedRows(slots, past, counts, blocks[0] if blocks else None)


def _check_range(first: int, inputs: dict[str, Value], cache: CacheSize) -> None:
    """RequestError where a range of slots is not within the caches."""
    past, new = (np.asarray(inputs[name]) for name in (PAST_LENGTHS, NEW_LENGTHS))
    if past.ndim != 1 or past.shape != new.shape or first + len(past) > cache.slots:
        raise RequestError(f"slots {first} to {first + len(past) - 1} are asked for; there are {cache.slots}")
    if len(past) and (past.min() < 0 or new.min() < 0 or (past + new).max() > cache.capacity):
        raise RequestError(f"rows do not fit the capacity of {cache.capacity} tokens")

"""A stage's host as a device: its connection, what is asked over it, and what happens when it is lost.

    lane's worker ── frame ──> host           the question's future waits in `_asked`, first come, first served
    reader <──────── frame ─── host           the first of them has its answer

If the connection ends or is silent, its stage is lost, and with it all that is under way in every stage of the
pipeline: the caches of the others hold rows that nobody will finish.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from pydantic import ValidationError
from stageline.models.errors import EngineError, RequestError, StagelineError, StageLostError, WireError
from stageline.runtime.cluster.children import Child
from stageline.runtime.cluster.messages import Done, Failed, Kind, Welcome
from stageline.runtime.cluster.wire import Frame, Wire
from stageline.runtime.devices.base import Array
from stageline.runtime.devices.cpu import start_worker
from stageline.runtime.validation import first_error


class Hosts:
    """The hosts of one pipeline, which are lost together."""

    def __init__(self) -> None:
        self.devices: list[RemoteDevice] = []
        self.lost: StageLostError | None = None
        """Why nothing is computed any more."""
        self._lock = threading.Lock()  # guards `lost`

    def lose(self, stage: int, name: str, why: str) -> StageLostError:
        """A stage is lost: fail all that is under way in every one. The first reason is the one that is told."""
        with self._lock:
            first = self.lost is None
            error = self.lost = self.lost or StageLostError(f"stage {stage} on {name} is lost: {why}")
        if first:
            for device in list(self.devices):
                device.fail(error)
        return error


class RemoteDevice:
    """The host of one stage. Keeps the promises of `Device`; owns its connection until `close()`."""

    def __init__(
        self, hosts: Hosts, wire: Wire, stage: int, name: str, cores: tuple[int, ...], child: Child | None = None
    ) -> None:
        """Read the host's welcome. `cores` may feed it; `child` is its process, if that is ours, and is owned from now
        on. RequestError if it is refused, WireError if there is none."""
        self.name, self.stage = name, stage
        self._child = child
        self.cores: tuple[int, ...] = ()
        self._feeding = cores
        self._hosts, self._wire = hosts, wire
        self._asked: deque[Future[Frame]] = deque()
        self._lock = threading.Lock()  # guards `_asked` and `_closed`
        self._closed = False
        self._busy_s = 0.0
        try:
            frame = wire.receive()
            if frame.kind == Kind.FAILED:
                raise RequestError(f"{name} refuses stage {stage}: {Failed.model_validate(frame.message).error}")
            self.step_tokens = Welcome.model_validate(frame.message).step_tokens
        except ValidationError as error:
            wire.close()
            raise WireError(f"its welcome is not valid ({first_error(error)})") from error
        except StagelineError:
            wire.close()
            raise
        self._reader = threading.Thread(target=self._read, name=f"reader-{stage}", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> str | None:
        """See `Device.lost`."""
        return None if self._hosts.lost is None else str(self._hosts.lost)

    def start_worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """See `Device.start_worker`. The thread may use any of the cores: it sends and waits."""
        return start_worker(name, self._feeding, work)

    def busy_s(self) -> float:
        """See `Device.busy_s`: of the host's clock, up to its last answer."""
        return self._busy_s

    def ask(self, kind: Kind, message: Mapping[str, Any], arrays: Sequence[Array] = ()) -> "Future[Frame]":
        """Send a question; the future has the answer, or StageLostError, or EngineError with what the host says. One
        thread asks. StageLostError if it is lost already."""
        answer: Future[Frame] = Future()
        with self._lock:
            if self._hosts.lost is not None or self._closed:
                raise self._gone()
            self._asked.append(answer)
        self.tell(kind, message, arrays)
        return answer

    def tell(self, kind: Kind, message: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
        """Send what is not answered."""
        try:
            self._wire.send(kind, message, arrays)
        except WireError as error:
            if self._hosts.lost is not None or self._closed:
                raise self._gone() from error
            raise self._lose(str(error)) from error

    def fail(self, error: StageLostError) -> None:
        """Fail all that is asked, and end the connection."""
        with self._lock:
            asked, self._asked = list(self._asked), deque()
        self._wire.close()
        if self._child is not None:
            self._child.close()
        for answer in asked:
            answer.set_exception(StageLostError(str(error)))

    def close(self) -> None:
        """End the connection: the host frees the stage. May be called again."""
        with self._lock:
            self._closed = True
        self.fail(StageLostError(f"stage {self.stage} on {self.name} was closed"))
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _gone(self) -> StageLostError:
        return StageLostError(self.lost or f"stage {self.stage} on {self.name} was closed")

    def _read(self) -> None:
        try:
            while True:
                self._take(self._wire.receive())
        except WireError as error:
            if not self._closed and self._hosts.lost is None:
                self._lose(str(error))
        except (ValidationError, IndexError) as error:
            self._lose(f"it answered what was not asked ({type(error).__name__})")

    def _lose(self, why: str) -> StageLostError:
        ended = f"; it {self._child.how_it_ended()}" if self._child is not None else ""
        return self._hosts.lose(self.stage, self.name, why + ended)

    def _take(self, frame: Frame) -> None:
        with self._lock:
            answer = self._asked.popleft()
        if frame.kind == Kind.FAILED:
            failed = Failed.model_validate(frame.message)
            answer.set_exception(EngineError(f"stage {self.stage} on {self.name}: {failed.error}"))
            return
        if frame.kind == Kind.DONE:
            self._busy_s = Done.model_validate(frame.message).busy_s
        answer.set_result(frame)

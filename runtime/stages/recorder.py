"""What the stages did and when: a recorder that a pipeline may carry, bounded however long it runs.

Times are seconds of `time.perf_counter`. A micro-batch is kept whole or not at all, and micro-batches that follow each
other are kept together, so that a gap between them is idle time: when the recorder is full, every other window of 64
micro-batches is dropped, and only every other one is kept from then on.
"""

import threading
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["batch", "prefill", "decode", "mixed", "copy"]
RUN_KINDS: tuple[Kind, ...] = ("batch", "prefill", "decode", "mixed")  # those in which an engine runs
WINDOW = 64  # micro-batches that are kept or dropped together


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work on a micro-batch of `rows` x `tokens`, which serves the requests of these numbers."""

    stage: int
    kind: Kind
    micro_batch: int
    began_s: float
    ended_s: float
    rows: int
    tokens: int
    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """A request from its submission to its end, however it ended."""

    number: int
    began_s: float
    ended_s: float


class Recordable(Protocol):
    """A micro-batch that can describe itself; asked when it has run."""

    @property
    def number(self) -> int:
        """Counts up in the order in which micro-batches enter the pipeline."""
        ...

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        """Kind, rows, tokens of each, and the numbers of the requests."""
        ...


class Recorder:
    """Keeps at most `max_spans` of stages (or those of the first window, if that has more), and as many of requests.

    Thread-safe.
    """

    def __init__(self, max_spans: int = 100_000) -> None:
        self._max_spans = max_spans
        self._lock = threading.Lock()  # guards the rest
        self._spans: list[Span] = []
        self._requests: list[RequestSpan] = []
        self._stride = self._requests_stride = 1

    def ran(self, stage: int, began_s: float, ended_s: float, work: Recordable, copying: bool = False) -> None:
        """A stage ran a micro-batch, or copied something for it."""
        if not _kept(work.number, self._stride):
            return
        kind, rows, tokens, requests = work.traced()
        span = Span(stage, "copy" if copying else kind, work.number, began_s, ended_s, rows, tokens, requests)
        with self._lock:
            self._spans.append(span)
            if len(self._spans) > self._max_spans:
                self._stride *= 2
                self._spans = [one for one in self._spans if _kept(one.micro_batch, self._stride)]

    def ended(self, number: int, began_s: float, ended_s: float) -> None:
        """A request has ended."""
        if not _kept(number, self._requests_stride):
            return
        with self._lock:
            self._requests.append(RequestSpan(number, began_s, ended_s))
            if len(self._requests) > self._max_spans:
                self._requests_stride *= 2
                self._requests = [one for one in self._requests if _kept(one.number, self._requests_stride)]

    def spans(self) -> list[Span]:
        """What is kept of the stages, in the order in which it ended."""
        with self._lock:
            return list(self._spans)

    def requests(self) -> list[RequestSpan]:
        """What is kept of the requests, in the order in which they ended."""
        with self._lock:
            return list(self._requests)


def _kept(number: int, stride: int) -> bool:
    return not (number // WINDOW) % stride

"""The load generator: sends requests to a contender, in a closed or an open loop, timed from their intended arrivals.

In an open loop the arrivals are fixed beforehand: a contender that stalls does not delay them, and the latency of a
request that was sent late includes the wait (no coordinated omission). In a closed loop the intended arrival of a
request is the end of the one before it. A later turn of a conversation arrives when its delay after the answer is over.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, cycle
from queue import Empty, SimpleQueue
from threading import Event
from time import perf_counter

import numpy as np
from stageline.runtime.bench.contenders import Contender, FailedRequestError, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED, CANCELLED, CUT, FAILED, UNANSWERED, Failures, Requests

DRAIN_S = 30.0
"""Requests unanswered this long after the last arrival are cancelled; later if twice the repeat's time is longer, or a
latency that they may yet keep."""
_POLL_S = 0.1
_GIVE_UP_AFTER = 10  # failures in a row
_MAX_GAPS = 1_000_000


@dataclass
class DriveResult:
    """The requests of one drive. `began_at`, `ended_at`: when it began, and the last end (`perf_counter`)."""

    began_at: float
    ended_at: float = 0.0
    requests: Requests = field(default_factory=lambda: Requests.join([]))
    gaps_s: list[float] = field(default_factory=list)
    failures: tuple[Failures, ...] = ()

    @property
    def seconds(self) -> float:
        """Duration, including the time in which the last requests end."""
        return self.ended_at - self.began_at


class Client:
    """Drives one contender, as often as asked. `items`, which may begin conversations, are sent in order, round and
    round.

    `stop` ends a drive early: no more requests are sent, unfinished ones are cancelled. `bound_s`: a latency that
    requests may keep; none is cancelled before it has passed.
    """

    def __init__(self, contender: Contender, items: Sequence[Item], stop: Event, bound_s: float = 0.0) -> None:
        self.contender, self._items, self.stop, self._bound_s = contender, cycle(items), stop, bound_s
        self.answered = 0
        """Requests answered so far; other threads may read it."""

    def closed_loop(self, concurrency: int, seconds: float, repeat: int = 0) -> DriveResult:
        """Keep `concurrency` conversations unfinished for `seconds`, then wait for the last answers."""
        drive = _Drive(self, repeat, self._items, closed_s=seconds)
        for _ in range(concurrency):
            drive.expect(drive.began_at, drive.next_item())
        drive.advance(drive.began_at + seconds)
        return drive.finish(self._drain_s(seconds))

    def open_loop(
        self,
        arrivals_s: Sequence[float],
        repeat: int = 0,
        ceiling: int | None = None,
        items: Sequence[Item] = (),
        give_up_s: float = math.inf,
    ) -> DriveResult:
        """Begin a conversation at each of these times (seconds from now, ascending), whatever happens to earlier ones.

        `ceiling`: requests that may be unfinished at a time; the others wait. `items`, if any, replace the client's,
        from the first one on. `give_up_s`: how long after the last arrival unfinished requests are waited for if they
        are more than those that have ended: then far more arrive than are answered, and the rest is cut.
        """
        drive = _Drive(self, repeat, cycle(items) if items else self._items, ceiling)
        for at in arrivals_s:
            drive.expect(drive.began_at + at, drive.next_item())
        last = arrivals_s[-1] if len(arrivals_s) else 0.0
        drive.advance(drive.began_at + last)
        return drive.finish(self._drain_s(last), max(give_up_s, self._bound_s))

    def _drain_s(self, seconds: float) -> float:
        return max(DRAIN_S, 2 * seconds, self._bound_s)


class _Drive:
    """A drive in progress. Everything except the futures' callbacks runs on the caller's thread.

    A request is due (its time has not come), then waiting (for a place below the ceiling), then sent and unfinished.
    """

    def __init__(
        self,
        client: Client,
        repeat: int,
        items: Iterator[Item],
        ceiling: int | None = None,
        closed_s: float | None = None,
    ) -> None:
        """`closed_s`: in a closed loop, how long the end of a conversation begins another one."""
        self._client, self._repeat, self._items, self._ceiling = client, repeat, items, ceiling or math.inf
        self._due: list[tuple[float, int, Item]] = []  # a heap; the number keeps the order of equal times
        self._waiting: deque[tuple[float, Item]] = deque()
        self._unfinished: dict[int, tuple[Future[RequestOutcome], Item]] = {}
        self._numbers = count()
        self._ended: SimpleQueue[tuple[int, float]] = SimpleQueue()
        self._rows = np.zeros((1024, 7))  # intended, sent, first token, end, tokens in, tokens out, status
        self._sent = 0
        self._failures: dict[str, Failures] = {}
        self._in_a_row = 0
        self._gaps: list[float] = []
        self.began_at = perf_counter()
        self._closes_at = None if closed_s is None else self.began_at + closed_s

    def next_item(self) -> Item:
        """The first turn of the next conversation."""
        return next(self._items)

    def expect(self, at: float, item: Item) -> None:
        """Send this request at that time, unless a closed loop is over by then."""
        if self._closes_at is None or at < self._closes_at:
            heapq.heappush(self._due, (at, next(self._numbers), item))

    def advance(self, until: float) -> None:
        """Send what is due and note what ends, until that time, or until nothing is left to do, or `stop`."""
        while not self._client.stop.is_set():
            now = perf_counter()
            while self._due and self._due[0][0] <= now:
                at, _, item = heapq.heappop(self._due)
                self._waiting.append((at, item))
            while self._waiting and len(self._unfinished) < self._ceiling and not self._client.stop.is_set():
                self._send(*self._waiting.popleft())
                while self._take(0.0):
                    pass
            if now >= until or not (self._due or self._waiting or self._unfinished):
                return
            self._take(min(until, self._due[0][0] if self._due else math.inf) - perf_counter())

    def finish(self, drain_s: float, give_up_s: float = math.inf) -> DriveResult:
        """Wait for unfinished requests and the turns after them, cancel those that remain, and return the result. They
        are waited for no longer than `give_up_s` if by then more are unfinished than have ended."""
        began_at, name = perf_counter(), self._client.contender.name
        self.advance(began_at + min(drain_s, give_up_s))
        kind, why = UNANSWERED, f"{name} did not answer within {drain_s:g} s of the last arrival"
        left, ended = len(self._waiting) + len(self._unfinished), self._sent - len(self._unfinished)
        if give_up_s < drain_s and left > ended:
            kind = CUT
            why = (
                f"{name} had answered {ended} of {ended + left} requests {give_up_s:g} s after the last arrival; far "
                "more arrive than it answers, so that the rest was not waited for"
            )
        elif give_up_s < drain_s:
            self.advance(began_at + drain_s)
        if not self._client.stop.is_set():
            for _ in range(len(self._waiting) + len(self._unfinished)):
                self._fail(kind, why)
            for at, item in self._waiting:  # the ceiling left them no place
                self._rows[self._new_row()] = at, perf_counter(), np.nan, perf_counter(), item.tokens_in, 0, CANCELLED
        for number, (future, _) in list(self._unfinished.items()):
            future.cancel()
            self._rows[number, 3] = perf_counter()
        rows = self._rows[: self._sent]
        times = rows[:, :4] - rows[:, :1]
        requests = Requests(
            np.full(self._sent, self._repeat, np.uint16),
            rows[:, 0] - self.began_at,
            times[:, 1].astype(np.float32),
            times[:, 2].astype(np.float32),
            times[:, 3].astype(np.float32),
            rows[:, 4].astype(np.uint32),
            rows[:, 5].astype(np.uint32),
            rows[:, 6].astype(np.uint8),
        )
        ended_at = float(rows[:, 3].max()) if self._sent else self.began_at
        return DriveResult(self.began_at, ended_at, requests, self._gaps, tuple(self._failures.values()))

    def _new_row(self) -> int:
        number, self._sent = self._sent, self._sent + 1
        if number == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        return number

    def _send(self, intended_at: float, item: Item) -> None:
        number, sent_at = self._new_row(), perf_counter()
        self._rows[number] = intended_at, sent_at, np.nan, np.nan, item.tokens_in, 0, CANCELLED
        future = self._client.contender.submit(item)
        self._unfinished[number] = future, item
        future.add_done_callback(partial(self._note, number))

    def _take(self, timeout_s: float) -> bool:
        """Record a request that has ended, and expect what follows it; False if none ends in time or at `stop`."""
        try:
            number, at = self._next(timeout_s)
        except Empty:
            return False
        future, item = self._unfinished.pop(number)
        row = self._rows[number]
        then = None
        if future.cancelled():
            row[3] = at
        elif (error := future.exception()) is not None:
            row[3], row[6] = at, FAILED
            self._fail(error.kind if isinstance(error, FailedRequestError) else type(error).__name__, str(error))
            self._in_a_row += not (isinstance(error, FailedRequestError) and error.shed)
            if self._in_a_row >= _GIVE_UP_AFTER:
                self._due.clear()
                self._waiting.clear()
                self.finish(0.0)
                raise error
        else:
            outcome, then = future.result(), item.then
            at = outcome.done_at
            first = np.nan if outcome.first_token_at is None else outcome.first_token_at
            row[2:4], row[5:7] = (first, at), (outcome.tokens_out, ANSWERED)
            if len(self._gaps) < _MAX_GAPS:
                self._gaps.extend(outcome.gaps_s)
            self._in_a_row = 0
            self._client.answered += 1
        if then is not None:
            self.expect(at + then.delay_s, then)
        elif self._closes_at is not None:
            self.expect(at, self.next_item())
        return True

    def _fail(self, kind: str, message: str) -> None:
        known = self._failures.get(kind, Failures(kind, 0, message[:300]))
        self._failures[kind] = replace(known, count=known.count + 1)

    def _next(self, timeout_s: float) -> tuple[int, float]:
        """The next request that has ended; checks `stop` while it waits."""
        deadline = perf_counter() + timeout_s
        while True:
            left = min(_POLL_S, deadline - perf_counter())
            with suppress(Empty):
                return self._ended.get(timeout=left) if left > 0 else self._ended.get_nowait()
            if self._client.stop.is_set() or perf_counter() >= deadline:
                raise Empty

    def _note(self, number: int, future: "Future[RequestOutcome]") -> None:
        self._ended.put((number, perf_counter()))

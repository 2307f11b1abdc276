"""The load generator: sends requests to a contender, in a closed or an open loop, timed from their intended arrivals.

In an open loop the arrivals are fixed beforehand: a contender that stalls does not delay them, and the latency of a
request that was sent late includes the wait (no coordinated omission). In a closed loop the intended arrival of a
request is the end of the one before it.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from queue import Empty, SimpleQueue
from threading import Event
from time import perf_counter

import numpy as np
from stageline.runtime.bench.contenders import Contender, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED, CANCELLED, FAILED, Requests

DRAIN_S = 30.0
"""Requests unanswered this long after the last arrival (or twice the repeat's time, if longer) are cancelled."""
_POLL_S = 0.1
_GIVE_UP_AFTER = 10  # failures in a row
_MAX_GAPS = 1_000_000


@dataclass
class DriveResult:
    """The requests of one drive. `began_at`, `ended_at`: first intended arrival and last end (`perf_counter`)."""

    began_at: float
    ended_at: float = 0.0
    requests: Requests = field(default_factory=lambda: Requests.join([]))
    gaps_s: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Duration, including the time in which the last requests end."""
        return self.ended_at - self.began_at


class Client:
    """Drives one contender, as often as asked. `items` are sent in order, round and round.

    `stop` ends a drive early: no more requests are sent, unfinished ones are cancelled.
    """

    def __init__(self, contender: Contender, items: Sequence[Item], stop: Event) -> None:
        self._contender, self._items, self._stop = contender, cycle(items), stop
        self.answered = 0
        """Requests answered so far; other threads may read it."""

    def closed_loop(self, concurrency: int, seconds: float, repeat: int = 0) -> DriveResult:
        """Keep `concurrency` requests unfinished for `seconds`, then wait for the last answers."""
        drive = _Drive(self, repeat)
        end = drive.began_at + seconds
        for _ in range(concurrency):
            drive.send(drive.began_at)
        while (left := end - perf_counter()) > 0 and not self._stop.is_set():
            ended_at = drive.take(left)
            if ended_at is not None and ended_at < end:
                drive.send(ended_at)
        return drive.finish(0.0 if self._stop.is_set() else _drain_s(seconds))

    def open_loop(self, arrivals_s: Sequence[float], repeat: int = 0) -> DriveResult:
        """Send a request at each of these times (seconds from now, ascending), whatever happens to earlier ones."""
        drive = _Drive(self, repeat)
        for arrival_s in arrivals_s:
            due = drive.began_at + arrival_s
            while (left := due - perf_counter()) > 0 and not self._stop.is_set():
                drive.take(left)
            if self._stop.is_set():
                break
            drive.send(due)
            while drive.take(0.0) is not None:
                pass
        return drive.finish(0.0 if self._stop.is_set() else _drain_s(arrivals_s[-1] if len(arrivals_s) else 0.0))


class _Drive:
    """A drive in progress. Everything except the futures' callbacks runs on the caller's thread."""

    def __init__(self, client: Client, repeat: int) -> None:
        self._client, self._repeat = client, repeat
        self._ended: SimpleQueue[tuple[int, Future[RequestOutcome], float]] = SimpleQueue()
        self._rows = np.zeros((1024, 7))  # intended, sent, first token, end, tokens in, tokens out, status
        self._futures: dict[int, Future[RequestOutcome]] = {}
        self._sent = 0
        self._failures = 0
        self._gaps: list[float] = []
        self.began_at = perf_counter()

    def send(self, intended_at: float) -> None:
        item = next(self._client._items)
        number, self._sent = self._sent, self._sent + 1
        if number == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        sent_at = perf_counter()
        self._rows[number] = intended_at, sent_at, np.nan, np.nan, item.tokens_in, 0, CANCELLED
        future = self._client._contender.submit(item)
        self._futures[number] = future
        future.add_done_callback(partial(self._note, number))

    def take(self, timeout_s: float) -> float | None:
        """Record a request that has ended, and return when; None if none ends in time or the client is stopped."""
        try:
            number, future, at = self._next(timeout_s)
        except Empty:
            return None
        del self._futures[number]
        row = self._rows[number]
        if future.cancelled():
            row[3] = at
        elif (error := future.exception()) is not None:
            row[3], row[6] = at, FAILED
            self._failures += 1
            if self._failures >= _GIVE_UP_AFTER:
                self.finish(0.0)
                raise error
        else:
            outcome = future.result()
            at = outcome.done_at
            first = np.nan if outcome.first_token_at is None else outcome.first_token_at
            row[2:4], row[5:7] = (first, at), (outcome.tokens_out, ANSWERED)
            if len(self._gaps) < _MAX_GAPS:
                self._gaps.extend(outcome.gaps_s)
            self._failures = 0
            self._client.answered += 1
        return at

    def finish(self, drain_s: float) -> DriveResult:
        """Wait for unfinished requests, cancel those that remain, and return the result."""
        deadline = perf_counter() + drain_s
        while self._futures and not self._client._stop.is_set() and (left := deadline - perf_counter()) > 0:
            self.take(left)
        for future in list(self._futures.values()):
            future.cancel()
        for number in self._futures:
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
        return DriveResult(self.began_at, ended_at, requests, self._gaps)

    def _next(self, timeout_s: float) -> tuple[int, "Future[RequestOutcome]", float]:
        """The next request that has ended; checks `stop` while it waits."""
        deadline = perf_counter() + timeout_s
        while True:
            left = min(_POLL_S, deadline - perf_counter())
            with suppress(Empty):
                return self._ended.get(timeout=left) if left > 0 else self._ended.get_nowait()
            if self._client._stop.is_set() or perf_counter() >= deadline:
                raise Empty

    def _note(self, number: int, future: "Future[RequestOutcome]") -> None:
        self._ended.put((number, future, perf_counter()))


def _drain_s(seconds: float) -> float:
    return max(DRAIN_S, 2 * seconds)

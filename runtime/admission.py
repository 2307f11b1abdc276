"""A bounded number of permits, handed out first come, first served, to threads and to coroutines."""

import asyncio
import threading
from collections import deque
from concurrent.futures import Future

from stageline.models.errors import QueueFullError, RequestError


class Admission:
    """`bound` permits. Each permit taken is given back once, by `give_back`."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._free = bound
        self._tickets: deque[Future[None]] = deque()  # of those who wait; only while no permit is free
        self._lock = threading.Lock()
        self._closed = ""  # why, once closed

    def take(self, wait: bool, timeout: float | None) -> None:
        """Take a permit, waiting for at most `timeout` seconds (None: for ever) if `wait`.

        QueueFullError if none came, RequestError if closed.
        """
        ticket = self._take_or_queue(wait)
        if ticket is None:
            return
        try:
            ticket.result(timeout)
        except TimeoutError:
            if ticket.cancel():
                raise self._full(f" after {timeout} s") from None
            ticket.result()  # granted, or closed, in this moment
        except BaseException:  # KeyboardInterrupt: nobody will use the permit
            self._leave(ticket)
            raise

    async def take_async(self) -> None:
        """Take a permit, waiting without blocking the event loop."""
        ticket = self._take_or_queue(wait=True)
        if ticket is None:
            return
        try:
            await asyncio.wrap_future(ticket)
        except asyncio.CancelledError:
            self._leave(ticket)
            raise

    def give_back(self) -> None:
        """Give a permit back; it goes to whoever has waited longest."""
        with self._lock:
            while self._tickets:
                ticket = self._tickets.popleft()
                if ticket.set_running_or_notify_cancel():
                    ticket.set_result(None)
                    return
            self._free += 1

    def close(self, why: str) -> None:
        """Raise RequestError in everyone who waits or comes later."""
        with self._lock:
            self._closed = why
            tickets, self._tickets = self._tickets, deque()
        for ticket in tickets:
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(RequestError(why))

    def _take_or_queue(self, wait: bool) -> Future[None] | None:
        """None if a permit was taken, else a ticket that is done when one is."""
        with self._lock:
            if self._closed:
                raise RequestError(self._closed)
            if self._free:
                self._free -= 1
                return None
            if not wait:
                raise self._full("")
            ticket: Future[None] = Future()
            self._tickets.append(ticket)
            return ticket

    def _leave(self, ticket: Future[None]) -> None:
        """Stop waiting; a permit that was granted in this moment goes back."""
        if not ticket.cancel() and ticket.exception() is None:
            self.give_back()

    def _full(self, after: str) -> QueueFullError:
        return QueueFullError(
            f"the queue is full{after}: {self._bound} requests are not finished yet; "
            "wait for one of them (wait=True), or open the pipeline with a longer queue"
        )

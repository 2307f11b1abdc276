"""What a submitter holds of a request that generates: its pieces as they come, to threads and to coroutines."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from stageline.runtime.generation.request import Completion, Delta, FinishReason, TokenLogprob

Piece = tuple[int, str, tuple[int, ...], tuple[TokenLogprob, ...], FinishReason | None]
"""What a Delta is made of, where it is read."""


class Generation:
    """A running request. Iterate over it, with `for` or `async for`, for its pieces; it has one reader.

    Leaving the loop early cancels the request. `result()` or `await` returns the whole when it is done. Errors
    (EngineError, DeadlineError, RequestError when the pipeline is closed) are raised where the reader is.
    """

    def __init__(self) -> None:
        self.future: Future[Completion] = Future()
        """Done with the request. Cancelling it cancels the request and frees its slots at the next step."""
        self.prompt_logprobs: list[TokenLogprob | None] = []
        """Those of the prompt, whole before the first piece comes; empty unless they were asked for."""
        # The writer adds pieces, then looks for a reader that waits; the reader says that it waits, then looks for
        # pieces. So no lock is needed where nobody waits.
        self._pieces: deque[Piece] = deque()
        self._waits = False
        self._news = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self.future.add_done_callback(lambda future: self.push(()))

    def __iter__(self) -> Iterator[Delta]:
        try:
            while True:
                self._wait_here()
                yield from self._taken()
                if self.future.done() and not self._pieces:
                    break
        finally:
            self.cancel()
        if not self.future.cancelled():
            self.future.result()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while True:
                await self._wait()
                for piece in self._taken():
                    yield piece
                if self.future.done() and not self._pieces:
                    break
        finally:
            self.cancel()
        if not self.future.cancelled():
            self.future.result()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self.aresult().__await__()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole, at most `timeout` seconds (TimeoutError)."""
        return self.future.result(timeout)

    async def aresult(self) -> Completion:
        """The whole, for coroutines. Cancelling the task cancels the request."""
        return await asyncio.wrap_future(self.future)

    def cancel(self) -> bool:
        """Stop generating; True unless it was done. Its slots are free at the next step."""
        return self.future.cancel()

    def push(self, pieces: Sequence[Piece]) -> None:
        """Hand pieces to the reader, or wake it at the end."""
        self._pieces.extend(pieces)
        if not self._waits:
            return
        with self._news:
            waiter, self._waiter = self._waiter, None
            self._news.notify_all()
        if waiter is not None:
            loop, woken = waiter
            try:
                loop.call_soon_threadsafe(_wake, woken)
            except RuntimeError:  # the loop was closed: nobody reads any more
                self.cancel()

    def _taken(self) -> list[Delta]:
        return [Delta(*self._pieces.popleft()) for _ in range(len(self._pieces))]

    def _has_news(self) -> bool:
        return bool(self._pieces) or self.future.done()

    def _wait_here(self) -> None:
        if self._has_news():
            return
        with self._news:
            self._waits = True
            self._news.wait_for(self._has_news)
            self._waits = False

    async def _wait(self) -> None:
        if self._has_news():
            return
        loop = asyncio.get_running_loop()
        with self._news:
            woken = loop.create_future()
            self._waiter, self._waits = (loop, woken), True
        try:
            if not self._has_news():
                await woken
        finally:
            self._waits = False


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)

"""How late the event loop is: what keeps it from its next task keeps all streams waiting."""

import asyncio
import time
from typing import Self

from stageline.runtime.times import Histogram, Tally

EVERY_S = 0.01


class EventLoopDelay:
    """A task that sleeps for EVERY_S and counts how much longer that took. `async with` runs it."""

    def __init__(self) -> None:
        self._late_s = Tally()

    @property
    def histogram(self) -> Histogram:
        """Of the delays, in seconds."""
        return self._late_s.histogram()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self._late_s.add(max(0.0, time.monotonic() - due))

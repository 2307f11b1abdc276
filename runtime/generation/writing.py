"""What was drawn, on its way to the readers: its text is made while the stages compute the next step.

The next step needs the tokens, and where a text may hold a stop that ends it, the text. All else waits here until the
step is on its way: text, log probabilities, pieces for readers, times.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.meter import Meter
from stageline.runtime.generation.request import FinishReason
from stageline.runtime.generation.running import Job, RunningChoice, Text
from stageline.runtime.generation.stream import Generation, Piece

Taken = tuple[RunningChoice, int | None, FinishReason | None, Text | None, NDArray[np.float32] | None]
"""A token of a choice (None: it ends without), why it is the last one if it is, its text if that is known already, and
the logits of which its log probability is wanted."""

Scores = tuple[Job, int, NDArray[np.float32]]
"""Logits [tokens, vocabulary] that say how likely tokens of a request's prompt are, and the first of these."""


class Writer:
    """Writes what steps have drawn, in the order in which they left the last stage. For the driver's thread."""

    def __init__(self, meter: Meter, finished: Callable[[Job, float], None]) -> None:
        """`finished` is called with each job of which all is written, and the time at which its last token came."""
        self._meter, self._finished = meter, finished
        self._steps: deque[tuple[int, float, list[Taken], list[Scores]]] = deque()

    def __bool__(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._steps)

    def put(self, group: int, now: float, taken: list[Taken], scores: list[Scores]) -> None:
        """Keep what a step of a group of slots has drawn, and says of prompts, which came `now`."""
        self._steps.append((group, now, taken, scores))

    def holds(self, group: int) -> bool:
        """Whether something waits that a step of this group has drawn."""
        return any(step[0] == group for step in self._steps)

    def write(self) -> None:
        """Write all that waits."""
        while self._steps:
            _, now, taken, scores = self._steps.popleft()
            for job, first, logits in scores:
                job.score(first, logits)
            self._write(now, taken)

    def _write(self, now: float, taken: list[Taken]) -> None:
        pieces: dict[Generation, list[Piece]] = {}
        before: list[float] = []
        ended: list[Job] = []
        for choice, token, reason, text, logits in taken:
            job = choice.job
            piece = choice.write(token, reason, text, logits)
            pieces.setdefault(job.generation, []).append(piece)
            if choice.number == 0 and token is not None:
                if job.token_times:
                    before.append(job.token_times[-1])
                else:
                    self._meter.first_token(now - job.submitted_at)
                job.token_times.append(now)
            if reason is not None:
                job.unfinished -= 1
                if not job.unfinished:
                    ended.append(job)
        self._meter.later_tokens(now, before)
        for generation, new in pieces.items():
            generation.push(new)
        for job in ended:
            self._finished(job, now)

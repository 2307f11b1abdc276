"""How many drafted tokens a step computes beside those that are known.

A step of R rows that also computes drafts takes longer and gives more tokens: R, and of each row's draft those up to
the first wrong one (Leviathan et al. 2023, arXiv 2211.17192). Drafted tokens are added, the likeliest first, as long as
the expected tokens a second rise. What a step's time depends on is measured while it runs.
"""

import heapq
from collections.abc import Iterator, Sequence

from stageline.runtime.generation.lookup import Lookup

MOST = 24
"""Drafted tokens of a row in a step."""
_SURE = 0.95  # few are likelier to be right
_FADE = 0.98  # a step that was seen counts for so much less with each later one
_PRIOR = 0.1  # what another token adds to the time of a step of one, before anything was measured
_PRIOR_WEIGHT = 4.0


class Speculation:
    """Decides for one pipeline, from the times of its steps lately: a line through their tokens and seconds."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens, drafted ones included, took so long."""
        self._weight = _FADE * self._weight + 1
        self._tokens = _FADE * self._tokens + tokens
        self._seconds = _FADE * self._seconds + seconds
        self._squares = _FADE * self._squares + tokens * tokens
        self._products = _FADE * self._products + tokens * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each token; in other units before the first step."""
        if not self._weight:
            return 1 - _PRIOR, _PRIOR
        tokens, seconds = self._tokens / self._weight, self._seconds / self._weight
        spread = max(0.0, self._squares - tokens * self._tokens)
        expected = _PRIOR * seconds / (1 + _PRIOR * (tokens - 1))
        each = (self._products - seconds * self._tokens + _PRIOR_WEIGHT * expected) / (spread + _PRIOR_WEIGHT)
        each = min(max(each, 0.0), seconds / tokens)
        return seconds - each * tokens, each

    def counts(self, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
        """How many tokens of its draft each of a step's rows gets; a row has what drafts for it, and a limit."""
        base, each = self.line()
        taken = [0] * len(rows)
        expected, tokens = float(len(rows)), len(rows)
        if _SURE * (base + each * tokens) <= each * expected:
            return taken  # without a look at any row
        queue: list[tuple[float, int, Iterator[float]]] = []
        for number, (lookup, limit) in enumerate(rows):
            if lookup is None or limit < 1:
                continue
            lookup.read()
            chances = lookup.chances()
            if (first := next(chances, None)) is not None:
                queue.append((-first, number, chances))
        heapq.heapify(queue)
        while queue:
            chance, number, chances = heapq.heappop(queue)
            if -chance * (base + each * tokens) <= each * expected:
                break
            taken[number] += 1
            tokens += 1
            expected -= chance
            if taken[number] < min(rows[number][1], MOST):
                heapq.heappush(queue, (-next(chances), number, chances))
        return taken

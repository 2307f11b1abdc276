"""How many drafted tokens a step computes beside those that are known.

A step of R rows that also computes drafts takes longer and gives more tokens: R, and of each row's draft those up to
the first wrong one (Leviathan et al. 2023, arXiv 2211.17192). Drafted tokens are added, the likeliest first, as long as
the expected tokens a second rise.
"""

import heapq
from collections.abc import Iterator, Sequence

from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.step_times import StepTimes

MOST = 24
"""Drafted tokens of a row in a step."""
_SURE = 0.95  # few are likelier to be right


class Speculation:
    """Decides for one pipeline, from the times of its steps."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times

    def begin(self, tokens: Sequence[int]) -> Lookup:
        """What drafts for a row of these tokens, which grow."""
        return Lookup(tokens)

    def drafting(self, rows: int) -> float:
        """Seconds that drafting a token takes, of so many rows together, before the step can begin."""
        return 0.0

    def close(self) -> None:
        """Free what it holds. May be called again."""

    def counts(self, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
        """How many tokens of its draft each of a step's rows gets; a row has what drafts for it, and a limit."""
        base, each = self._times.line()
        drafted = each + self.drafting(len(rows))
        taken = [0] * len(rows)
        expected, seconds = float(len(rows)), base + each * len(rows)
        if _SURE * seconds <= drafted * expected:
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
            if -chance * seconds <= drafted * expected:
                break
            taken[number] += 1
            seconds += drafted
            expected -= chance
            if taken[number] < min(rows[number][1], MOST):
                heapq.heappush(queue, (-next(chances), number, chances))
        return taken

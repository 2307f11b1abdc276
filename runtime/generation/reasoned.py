"""A structure that begins when the model has reasoned: until then its text is free."""

from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.grammars import Matcher
from stageline.runtime.generation.structure import Reasoning


class _Place(Enum):
    BEFORE = auto()  # nothing is written; either reasoning or the answer begins
    INSIDE = auto()
    AFTER = auto()


class ReasonedMatcher:
    """A `Matcher` that does not look at the reasoning before its text; used as that one is."""

    def __init__(self, matcher: Matcher, reasoning: Reasoning, end_ids: NDArray[np.int64]) -> None:
        """`end_ids`: tokens that end a text, which do not come while it reasons."""
        self._matcher, self._reasoning, self._end_ids = matcher, reasoning, end_ids
        self._place = _Place.INSIDE if reasoning.begun else _Place.BEFORE

    def copy(self) -> "ReasonedMatcher":
        """See `Matcher`."""
        return ReasonedMatcher(self._matcher.copy(), self._reasoning, self._end_ids)

    @property
    def complete(self) -> bool:
        """See `Matcher`."""
        return self._matcher.complete

    @property
    def error(self) -> str:
        """See `Matcher`."""
        return "" if self._place is _Place.INSIDE else self._matcher.error

    def masked(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Matcher`."""
        if self._place is _Place.INSIDE:
            free = scores.copy()
            free[self._end_ids] = -np.inf
            return free
        masked = self._matcher.masked(scores)
        if self._place is _Place.BEFORE:
            masked[self._reasoning.begin] = scores[self._reasoning.begin]
        return masked

    def take(self, token: int) -> None:
        """See `Matcher`."""
        if self._place is _Place.INSIDE:
            self._place = _Place.AFTER if token == self._reasoning.end else _Place.INSIDE
        elif self._place is _Place.BEFORE and token == self._reasoning.begin:
            self._place = _Place.INSIDE
        else:
            self._place = _Place.AFTER
            self._matcher.take(token)


RowMatcher = Matcher | ReasonedMatcher

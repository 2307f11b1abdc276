"""The rows of a group that decode together, kept from one step to the next: each step takes one token of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.continuation import Continuation, Slot


@dataclass(eq=False, slots=True)
class Decoding:
    """Rows in the order in which a step has them. All arrays are int64 [rows], but `last`, which is bool, all True."""

    slots: Sequence[Slot]
    continuations: tuple[Continuation, ...]
    numbers: NDArray[np.int64]
    """Of the slots."""
    counts: NDArray[np.int64]
    """Tokens of each in the caches: where the next one goes."""
    ones: NDArray[np.int64]
    last: NDArray[np.bool_]

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> "Decoding":
        """The rows of these slots, as they are."""
        return cls(
            slots,
            tuple(slot.continuation for slot in slots if slot.continuation is not None),
            np.array([slot.number for slot in slots], np.int64),
            np.array([slot.count for slot in slots], np.int64),
            np.ones(len(slots), np.int64),
            np.ones(len(slots), np.bool_),
        )

    def advance(self) -> NDArray[np.int64]:
        """Take the next token of each for computed. The tokens [rows], which are known."""
        tokens = []
        self.counts = self.counts + 1  # a new array: the step before may still be read
        for slot, continuation, count in zip(self.slots, self.continuations, self.counts.tolist(), strict=True):
            tokens.append(continuation.tokens[count - 1])
            slot.count = continuation.computed = count
            continuation.flying += 1
        return np.array(tokens, np.int64)

"""A step: what the stages do in one go, as the scheduler issues it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.slots import Copy

StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of a step: tokens `start` to `start + count` of a continuation. `last`: the logits of the last one are
    wanted, to draw the next. Its keys are made for a row of `row_length` tokens. `blocks`: where its tokens lie, if the
    caches are blocks. `scored`: of how many tokens logits are wanted to tell how likely the prompt's next ones are;
    they are the last ones, or those before the last one if `last`. `drafted`: how many tokens at its end are a draft;
    logits of these and of the one before them are wanted."""

    continuation: Continuation
    slot: int
    start: int
    count: int
    last: bool
    row_length: int
    blocks: tuple[int, ...] = ()
    scored: int = 0
    drafted: int = 0


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step as arrays, int64 [rows] but for those said to be otherwise; see StepRow. They are read only:
    steps that follow each other share what they have in common."""

    continuations: tuple[Continuation, ...]
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    last: NDArray[np.bool_]
    row_lengths: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """[tokens]: the new ones of all rows, one row after the other. None of a step that is issued ahead."""
    blocks: NDArray[np.int32] | None = None
    """[blocks]: those of all rows, one row after the other, as many as its tokens fill with the new ones."""
    block_size: int = 0
    scored: NDArray[np.int64] | None = None
    """None if it is 0 for all."""
    drafted: NDArray[np.int64] | None = None
    """None if it is 0 for all."""

    @property
    def picks(self) -> NDArray[np.int64]:
        """Of how many tokens of each row logits are wanted; they are its last ones. int64 [rows]."""
        picks = self.last.astype(np.int64)
        for more in (self.scored, self.drafted):
            if more is not None:
                picks += more
        return picks

    @classmethod
    def of(cls, rows: Sequence[StepRow], block_size: int) -> "StepRows":
        """Some rows, which have blocks unless `block_size` is 0."""
        slots, starts, counts, last, lengths, scored, drafted = np.array(
            [(r.slot, r.start, r.count, r.last, r.row_length, r.scored, r.drafted) for r in rows], np.int64
        ).T.copy()
        tokens = [token for row in rows for token in row.continuation.between(row.start, row.start + row.count)]
        blocks = np.array([block for row in rows for block in row.blocks], np.int32) if block_size else None
        columns = slots, starts, counts, last != 0, lengths, np.array(tokens, np.int64), blocks, block_size
        more = [column if column.any() else None for column in (scored, drafted)]
        return cls(tuple(row.continuation for row in rows), *columns, *more)

    def __iter__(self) -> Iterator[StepRow]:
        blocks = [] if self.blocks is None else self.blocks.tolist()
        none = np.zeros_like(self.slots)
        more = (none if column is None else column for column in (self.scored, self.drafted))
        columns = self.slots, self.starts, self.counts, self.last, self.row_lengths, *more
        for continuation, slot, start, count, last, row_length, scored, drafted in zip(
            self.continuations, *(column.tolist() for column in columns), strict=True
        ):
            own = -(-(start + count) // self.block_size) if blocks else 0
            yield StepRow(continuation, slot, start, count, last, row_length, tuple(blocks[:own]), scored, drafted)
            del blocks[:own]


@dataclass(frozen=True, eq=False)
class Step:
    """What the stages do in one go, on `batch` rows of `length` tokens.

    Of a range the batch is slots `first_slot` and on; those that are not in `rows` have nothing new. Of packed tokens
    (`first_slot` is None) it is the new tokens of `rows`, one after the other, each a row of its own.
    """

    number: int
    kind: StepKind
    group: int
    first_slot: int | None
    batch: int
    length: int
    arrays: StepRows
    copies: tuple[Copy, ...]

    @cached_property
    def rows(self) -> tuple[StepRow, ...]:
        """Its rows one by one."""
        return tuple(self.arrays)

    def __str__(self) -> str:
        rows = " ".join(f"{row.slot}:{row.start}+{row.count}" for row in self.rows)
        copies = "".join(f" ({copy.source}>{copy.target}:{copy.tokens})" for copy in self.copies)
        return f"{self.number} {self.kind} {rows}{copies}"


def chosen(step: Step) -> list[tuple[int, Continuation]]:
    """The continuations whose next token is drawn from a step's logits, each with the place of these among all rows of
    the logits [slots * picks, or picks of packed tokens]. Those after the tokens of a draft are at the next places."""
    rows = step.arrays
    continuations = [one for one, last in zip(rows.continuations, rows.last.tolist(), strict=True) if last]
    if rows.scored is not None or rows.drafted is not None:
        places = _begins(step) + (0 if rows.scored is None else rows.scored)
        return list(zip(places[rows.last].tolist(), continuations, strict=True))
    if step.first_slot is None:
        return list(enumerate(continuations))
    return list(zip((rows.slots[rows.last] - step.first_slot).tolist(), continuations, strict=True))


def scored(step: Step) -> list[tuple[Continuation, int, slice]]:
    """The continuations of whose prompts a step says how likely tokens are, each with the first of these tokens and the
    places of their logits, counted as in `chosen`."""
    rows = step.arrays
    if rows.scored is None:
        return []
    begins, counts = _begins(step), rows.scored
    firsts = rows.starts + rows.counts - rows.picks + 1  # logits are of the token after
    return [
        (continuation, first, slice(begin, begin + count))
        for continuation, first, begin, count in zip(
            rows.continuations, firsts.tolist(), begins.tolist(), counts.tolist(), strict=True
        )
        if count
    ]


def _begins(step: Step) -> NDArray[np.int64]:
    """Where the logits of each row begin, [rows]."""
    picks = step.arrays.picks
    if step.first_slot is None:
        return np.cumsum(picks) - picks
    return (step.arrays.slots - step.first_slot) * int(picks.max())

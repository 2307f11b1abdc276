"""The slots that continuations run in, and what the caches hold of their rows, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.blocks import Blocks
from stageline.runtime.generation.continuation import Continuation, Slot
from stageline.runtime.generation.decoding import Decoding

_UNKNOWN = -1  # a token that the host has not seen: like none of a prompt
MIN_SHARED = 16  # tokens: a shorter common beginning is not worth a copy


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` tokens of slot `source` go into slot `target`, before the step."""

    source: int
    target: int
    tokens: int


class Slots:
    """Slots with a row of `capacity` tokens to each one, in `groups` ranges. A row that begins like what another slot
    holds is given a copy of that, and a slot keeps what it holds until it is given to another row. Then it goes to the
    one unused for longest of `shelves`, rows after those of the slots, in which nothing runs."""

    def __init__(self, count: int, capacity: int, groups: int, shelves: int = 0) -> None:
        self.capacity = capacity
        self._tokens, self._made_by, self._made_for = np.zeros((3, count + shelves, capacity), np.int64)
        rows = zip(self._tokens, self._made_by, self._made_for, strict=True)
        self._all = [Slot(number, 0, *row) for number, row in enumerate(rows)]
        self.slots, self._shelves = self._all[:count], self._all[count:]
        self._clock = 0
        self._copies: list[Copy] = []
        self.regroup(groups)

    def regroup(self, groups: int) -> None:
        """Put the slots into other groups."""
        for slot in self.slots:
            slot.group = slot.number * groups // len(self.slots)

    def forget(self) -> None:
        """No continuation runs, and the caches hold nothing any more."""
        self._copies = []
        for slot in self._all:
            assert slot.continuation is None
            slot.count = 0

    def place(self, tokens: Sequence[int], kind: int, shares: bool = True) -> Slot | None:
        """A slot for a row of these tokens, whose keys are made for this kind of row. It holds `count` of them already,
        which leaves at least one to be computed, and all unless it `shares`. None if there is no room."""
        free = self._free()
        if not free:
            return None
        row = np.array(tokens, np.int64)
        donor, shared = self._donor(row, kind) if shares else (None, 0)
        if donor in free and donor is not None and (not self._shelves or 2 * shared > donor.count):
            slot = donor
        else:
            slot = min(free, key=self._placing_cost)
            self._shelve(slot, donor)
        if donor is not None and slot is not donor:
            self._copy(donor, slot, shared)
            if 2 * shared > donor.count and donor in self._shelves:
                donor.used_at = 0  # the slot has it now
        slot.tokens[:shared] = row[:shared]
        slot.count = shared
        self._touch(slot)
        return slot

    def has_room(self, slot: Slot, tokens: int) -> bool:
        """Make room for a row of so many tokens, if there is any."""
        return tokens <= self.capacity

    def record(self, slot: Slot, tokens: Sequence[int], end: int, step: int, kind: int, known: int) -> None:
        """Step `step` computes the row's tokens up to `end`; these are `tokens`, or unknown. There is room for them.
        From `known` on they are a draft: see `settle`."""
        new = slice(slot.count, end)
        slot.tokens[new] = tokens or _UNKNOWN
        slot.made_by[new], slot.made_for[new] = step, kind
        slot.count = end
        self._touch(slot)

    def settle(self, slot: Slot, count: int) -> None:
        """Of what a step has computed of a draft, the row has its first `count` tokens."""
        slot.count = count

    def is_short(self, rows: Decoding) -> bool:
        """Whether `has_room` must be asked before the rows get another token each."""
        return False

    def record_each(self, rows: Decoding, tokens: NDArray[np.int64], step: int, kinds: Sequence[int] | None) -> None:
        """Step `step` computes the last of each row's tokens, which are `tokens`, of `kinds` (None: all 0)."""
        places = rows.counts - 1
        self._tokens[rows.numbers, places] = tokens
        self._made_by[rows.numbers, places] = step
        if kinds is not None:
            self._made_for[rows.numbers, places] = kinds
        for clock, slot in enumerate(rows.slots, start=self._clock + 1):
            slot.used_at = clock
        self._clock += len(rows.slots)

    def rewind(self, slot: Slot, count: int, step: int) -> bool:
        """Let the row's tokens from `count` on be computed again, which the failed step `step` was the last to compute;
        False if others have begun with them."""
        slot.count = count
        return True

    def blocks_of(self, slot: Slot) -> Sequence[int]:
        """Where the row's tokens lie, if the caches are blocks."""
        return ()

    def blocks_of_each(self, rows: Decoding) -> NDArray[np.int32] | None:
        """Those of all rows, one row after the other."""
        return None

    def leave(self, slot: Slot, keep: int | None) -> None:
        """The slot's continuation lets go of it. What it holds is kept for others, or only the first `keep` tokens."""
        slot.continuation = None
        self._touch(slot)
        if keep is not None:
            slot.count = min(slot.count, keep)

    def spoilt(self, step: int) -> list[Continuation]:
        """A step has failed: forget what it was to leave, with all copies of it. The continuations that lose by it."""
        lost = []
        for slot in self._all:
            spoilt = np.flatnonzero(slot.made_by[: slot.count] == step)
            if len(spoilt):  # what follows was computed from it
                slot.count = int(spoilt[0])
                if slot.continuation is not None:
                    lost.append(slot.continuation)
        return lost

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies that come before the next step."""
        copies, self._copies = tuple(self._copies), []
        return copies

    @property
    def usage(self) -> float:
        """The share of the caches that rows in use fill, 0 to 1."""
        return self._filled() / (len(self.slots) * self.capacity)

    def _filled(self) -> int:
        return sum(slot.count for slot in self.slots if slot.continuation is not None)

    def _free(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.continuation is None]

    def _shelve(self, slot: Slot, donor: Slot | None) -> None:
        """Put what a slot holds on a shelf, before it is lost: in place of the beginning of the same, else of what was
        unused for longest. `donor` is needed where it is."""
        if slot.count < MIN_SHARED:
            return
        shelves = [shelf for shelf in self._shelves if shelf is not donor]
        same = [shelf for shelf in shelves if shelf.count and _alike(shelf, slot, min(shelf.count, slot.count))]
        if any(shelf.count >= slot.count for shelf in same):
            return
        shelf = min(same or shelves, key=lambda shelf: shelf.used_at, default=None)
        if shelf is not None:
            self._copy(slot, shelf, slot.count)
            shelf.tokens[: slot.count] = slot.tokens[: slot.count]
            shelf.count, shelf.used_at = slot.count, slot.used_at

    def _copy(self, source: Slot, target: Slot, count: int) -> None:
        self._copies.append(Copy(source.number, target.number, count))
        target.made_by[:count] = source.made_by[:count]
        target.made_for[:count] = source.made_for[:count]

    def _donor(self, row: NDArray[np.int64], kind: int) -> tuple[Slot | None, int]:
        """The slot that holds most of a row's beginning, and how much; the last token is always computed."""
        best: tuple[Slot | None, int] = (None, 0)
        for slot in self._all:
            bound = min(slot.count, len(row) - 1)
            unlike = np.flatnonzero((slot.tokens[:bound] != row[:bound]) | (slot.made_for[:bound] != kind))
            shared = int(unlike[0]) if len(unlike) else bound
            if shared >= MIN_SHARED and (shared, slot.continuation is None) > (best[1], False):
                best = slot, shared
        return best

    def _placing_cost(self, slot: Slot) -> tuple[int, int, int]:
        """Groups evenly full; no idle rows between the busy ones of a group; then the slot unused for longest."""
        busy = [other.number for other in self.slots if other.group == slot.group and other.continuation is not None]
        span = max([*busy, slot.number]) - min([*busy, slot.number]) + 1
        return len(busy), span - len(busy), slot.used_at

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def _alike(one: Slot, other: Slot, count: int) -> bool:
    """Whether two slots hold the same in their first `count` tokens."""
    return bool(
        (one.tokens[:count] == other.tokens[:count]).all() and (one.made_for[:count] == other.made_for[:count]).all()
    )


class BlockSlots(Slots):
    """Slots whose rows lie in blocks, which they are given as they grow. Rows that begin alike share their first
    blocks, and nothing is copied."""

    def __init__(self, count: int, capacity: int, groups: int, blocks: Blocks) -> None:
        super().__init__(count, capacity, groups)
        self._blocks = blocks
        self._table = np.zeros((count, blocks.wanted(capacity)), np.int32)  # the blocks of each slot
        self._room = np.zeros(count, np.int64)  # tokens that the blocks of each slot hold

    def forget(self) -> None:
        """See `Slots.forget`."""
        super().forget()
        self._blocks.forget()

    def place(self, tokens: Sequence[int], kind: int, shares: bool = True) -> Slot | None:
        """See `Slots.place`. Beside rows that run there must be a block left for the growth of each."""
        free, blocks = self._free(), self._blocks
        if not free:
            return None
        shared = blocks.begin(tokens, kind) if shares else []
        wanted = blocks.wanted(len(tokens)) - len(shared)
        others = len(self.slots) - len(free)
        more = blocks.take(wanted) if blocks.free >= wanted + others else None
        if more is None:
            blocks.leave(shared)
            return None
        slot = min(free, key=self._placing_cost)
        self._give(slot, [*shared, *more])
        slot.count = len(shared) * blocks.size
        slot.tokens[: slot.count] = tokens[: slot.count]
        slot.made_for[: slot.count] = kind
        self._touch(slot)
        return slot

    def has_room(self, slot: Slot, tokens: int) -> bool:
        """See `Slots.has_room`."""
        more = self._blocks.take(max(0, self._blocks.wanted(tokens) - len(slot.blocks)))
        if more is None:
            return False
        if more:
            self._give(slot, more)
        return True

    def record(self, slot: Slot, tokens: Sequence[int], end: int, step: int, kind: int, known: int) -> None:
        """See `Slots.record`."""
        start = slot.count
        super().record(slot, tokens, end, step, kind, known)
        self._blocks.fill(slot.blocks, slot.tokens, start, end, kind, step, known)

    def settle(self, slot: Slot, count: int) -> None:
        """See `Slots.settle`. Blocks that are full of what is known now can be found."""
        super().settle(slot, count)
        self._blocks.settle(slot.blocks, slot.tokens, count)

    def is_short(self, rows: Decoding) -> bool:
        """See `Slots.is_short`."""
        return bool((rows.counts >= self._room[rows.numbers]).any())

    def record_each(self, rows: Decoding, tokens: NDArray[np.int64], step: int, kinds: Sequence[int] | None) -> None:
        """See `Slots.record_each`."""
        super().record_each(rows, tokens, step, kinds)
        size = self._blocks.size
        blocks, places = np.divmod(rows.counts - 1, size)
        self._blocks.note(self._table[rows.numbers, blocks], places, step)
        for number in np.flatnonzero(places == size - 1).tolist():
            slot = rows.slots[number]
            self._blocks.name(slot.blocks, slot.tokens, int(blocks[number]), 0 if kinds is None else kinds[number])

    def rewind(self, slot: Slot, count: int, step: int) -> bool:
        """See `Slots.rewind`."""
        filled = slot.blocks[count // self._blocks.size : self._blocks.wanted(slot.count)]
        if not self._blocks.unfill(filled, step):
            return False
        return super().rewind(slot, count, step)

    def blocks_of(self, slot: Slot) -> Sequence[int]:
        """See `Slots.blocks_of`."""
        return slot.blocks[: self._blocks.wanted(slot.count)]

    def blocks_of_each(self, rows: Decoding) -> NDArray[np.int32] | None:
        """See `Slots.blocks_of_each`."""
        wanted = -(-rows.counts // self._blocks.size)
        table = self._table[rows.numbers, : int(wanted.max())]
        return table[np.arange(table.shape[1]) < wanted[:, None]]

    def leave(self, slot: Slot, keep: int | None) -> None:
        """See `Slots.leave`. Blocks that are full are kept; none of a row that cannot be trusted."""
        super().leave(slot, 0)
        self._blocks.leave(slot.blocks, trusted=keep is None)
        slot.blocks = []
        self._room[slot.number] = 0

    def spoilt(self, step: int) -> list[Continuation]:
        """See `Slots.spoilt`."""
        bad = self._blocks.spoilt(step)
        lost = [slot.continuation for slot in self.slots if not bad.isdisjoint(slot.blocks)]
        return [continuation for continuation in lost if continuation is not None]

    @property
    def usage(self) -> float:
        """See `Slots.usage`."""
        return self._filled() / (self._blocks.count * self._blocks.size)

    def _give(self, slot: Slot, blocks: Sequence[int]) -> None:
        first = len(slot.blocks)
        slot.blocks += blocks
        self._table[slot.number, first : len(slot.blocks)] = blocks
        self._room[slot.number] = len(slot.blocks) * self._blocks.size

"""The blocks of the caches: what each holds, who uses it, and which is given away next, as plain data.

A block holds `size` tokens of a row. Rows that begin alike share their first blocks. Only full ones are shared,
and nothing is copied: nobody writes into a block that another row reads. A block that no row uses any more keeps
what it holds until it is taken for something else, the one unused for longest first, and the end of a row before its
beginning.

    number[block]  names what a full block holds: its tokens after those of the blocks before it. 0: not full yet
    _found[parent's number, kind, tokens]   the block that holds that; another one that came to hold the same has the
                                            same number, and is not found
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int, tuple[int, ...]]


class Blocks:
    """`count` blocks of `size` tokens, all free at first."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._users = [0] * count
        self._number = [0] * count
        self._key: list[Key | None] = [None] * count
        self._made_by = np.zeros((count, size), np.int64)  # the step of each token, 0: none
        self._found: dict[Key, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the next to take first
        self._numbers = 0

    @property
    def free(self) -> int:
        """How many no row uses."""
        return len(self._free)

    def wanted(self, tokens: int) -> int:
        """How many blocks a row of so many tokens has."""
        return -(-tokens // self.size)

    def begin(self, tokens: Sequence[int], kind: int) -> list[int]:
        """The blocks that hold the beginning of a row already; the row uses them from now on.

        They leave at least one of its tokens to be computed. `kind`: what else the keys depend on.
        """
        blocks: list[int] = []
        parent = 0
        for at in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            block = self._found.get((parent, kind, tuple(tokens[at : at + self.size])))
            if block is None:
                break
            blocks.append(block)
            parent = self._number[block]
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)
        return blocks

    def take(self, count: int) -> list[int] | None:
        """Blocks for new tokens of a row; None if so many are not free."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._users[block], self._number[block] = 1, 0
            self._made_by[block] = 0
        return taken

    def fill(
        self, row: Sequence[int], tokens: NDArray[np.int64], start: int, end: int, kind: int, step: int, known: int
    ) -> None:
        """Step `step` computes tokens `start` to `end` - 1 of a row, which has the blocks `row`. Only what is `known`,
        and not drafted, can be found."""
        for place in range(start // self.size, self.wanted(end)):
            before = place * self.size
            self._made_by[row[place], max(0, start - before) : end - before] = step
            if before + self.size <= known:
                self.name(row, tokens, place, kind)

    def settle(self, row: Sequence[int], tokens: NDArray[np.int64], known: int) -> None:
        """The first `known` tokens of a row are no draft any more: blocks that are full with them can be found."""
        full = known // self.size
        first = next((place + 1 for place in range(full - 1, -1, -1) if self._number[row[place]]), 0)
        for place in range(first, full):
            self.name(row, tokens, place, kind=0)

    def note(self, blocks: NDArray[np.int32], places: NDArray[np.int64], step: int) -> None:
        """Step `step` computes a token in each of the blocks, [blocks] different ones, at its place there."""
        self._made_by[blocks, places] = step

    def name(self, row: Sequence[int], tokens: NDArray[np.int64], place: int, kind: int) -> None:
        """Block number `place` of a row is full with these `tokens` of the row: it can be found now."""
        block, before = row[place], place * self.size
        parent = self._number[row[place - 1]] if place else 0
        key = parent, kind, tuple(tokens[before : before + self.size].tolist())
        twin = self._found.get(key)
        if twin is None:
            self._numbers += 1
            self._number[block] = self._numbers
            self._found[key], self._key[block] = block, key
        else:
            self._number[block] = self._number[twin]

    def unfill(self, row: Sequence[int], step: int) -> bool:
        """A step has failed that was to fill a row's last blocks, these; False if other rows use the first already (of
        the others nobody knows, since they are filled with a draft)."""
        if self._users[row[0]] > 1:
            return False
        self._forget(row[0])
        self._unmake(step, row)
        return True

    def leave(self, row: Sequence[int], trusted: bool = True) -> None:
        """A row lets go of its blocks; what they hold is not found any more if it is not `trusted`."""
        for block in reversed(row):
            self._users[block] -= 1
            if not trusted:
                self._forget(block)
            if not self._users[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=self._key[block] is not None)

    def forget(self) -> None:
        """The blocks hold nothing any more."""
        for block in range(self.count):
            self._forget(block)

    def spoilt(self, step: int) -> set[int]:
        """The blocks that a step was to fill, which has failed. They are not found any more, nor those after them."""
        blocks = np.flatnonzero((self._made_by == step).any(axis=1)).tolist()
        for block in blocks:
            self._forget(block)
        self._unmake(step, blocks)
        return set(blocks)

    def _unmake(self, step: int, blocks: Sequence[int]) -> None:
        made_by = self._made_by[list(blocks)]
        self._made_by[list(blocks)] = np.where(made_by == step, 0, made_by)

    def _forget(self, block: int) -> None:
        key, self._key[block] = self._key[block], None
        if key is not None:
            del self._found[key]

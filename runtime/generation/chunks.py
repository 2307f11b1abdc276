"""Which tokens of prompts the next step that reads some has: a chunk of them, of those whose turn it is."""

from collections.abc import Callable, Mapping, Sequence

from stageline.runtime.generation.continuation import Slot


class Chunks:
    """Chunks of at most `chunk` tokens, for caches of `capacity` tokens a slot.

    In turn the slot admitted first goes first and the one with least left to do, so that neither long prompts nor short
    ones wait for all of the others.
    """

    def __init__(self, chunk: int, capacity: int) -> None:
        self._chunk, self._capacity = chunk, capacity
        self._first_come = False

    def packed(self, unread: Sequence[Slot]) -> list[tuple[Slot, int]]:
        """Of the slots whose prompts are not issued yet, those that have tokens in the next step, and how many."""
        chosen, room = [], self._chunk
        for slot in sorted(unread, key=self._next_order()) if unread else []:
            count = min(room, _left(slot)[0])
            if count:
                chosen.append((slot, count))
                room -= count
        return chosen

    def of_range(self, unread: Sequence[Slot]) -> list[tuple[Slot, int]]:
        """The same for a step on a range: the slot that goes first, and neighbours that fill up its chunk without much
        padding."""
        if not unread:
            return []
        ready: Mapping[int, Slot] = {slot.number: slot for slot in unread}
        chosen = [min(unread, key=self._next_order())]
        for side in (1, -1):
            while (neighbour := ready.get(chosen[-1 if side > 0 else 0].number + side)) is not None:
                grown = [*chosen, neighbour] if side > 0 else [neighbour, *chosen]
                if not self._fits(grown):
                    break
                chosen = grown
        return [(slot, self._count(slot)) for slot in chosen]

    def _next_order(self) -> Callable[[Slot], tuple[int, int]]:
        self._first_come = not self._first_come
        return age if self._first_come else _left

    def _fits(self, slots: Sequence[Slot]) -> bool:
        counts = [self._count(slot) for slot in slots]
        padded = max(counts) * len(slots)
        return (
            padded <= self._chunk
            and 3 * padded <= 4 * sum(counts)  # at most a quarter is padding
            and all(slot.count + max(counts) <= self._capacity for slot in slots)
        )

    def _count(self, slot: Slot) -> int:
        return min(self._chunk, _left(slot)[0])


def age(slot: Slot) -> tuple[int, int]:
    """Orders slots in use by when they were given to their continuations."""
    assert slot.continuation is not None
    return slot.continuation.placed_at, slot.number


def _left(slot: Slot) -> tuple[int, int]:
    assert slot.continuation is not None
    return slot.continuation.prefill_length - slot.count, slot.continuation.placed_at

"""Which tokens of prompts the next step that reads some has: a chunk of them, of those whose turn it is."""

from collections.abc import Callable, Mapping, Sequence

from stageline.runtime.generation.continuation import Slot
from stageline.runtime.generation.step_times import StepTimes

GRAIN = 16
"""Tokens that a chunk which time bounds is a multiple of, and has at least, or prompts would never be read."""


class Chunks:
    """Chunks of at most `chunk` tokens, for caches of `capacity` tokens a slot. `tpot_target`: seconds that rows which
    decode may wait for their next token, by the `times` of steps.

    In turn the slot admitted first goes first and the one with least left to do, so that neither long prompts nor short
    ones wait for all of the others.
    """

    def __init__(self, chunk: int, capacity: int, tpot_target: float | None, times: StepTimes) -> None:
        self._chunk, self._capacity, self._target, self._times = chunk, capacity, tpot_target, times
        self._first_come = False

    def packed(self, unread: Sequence[Slot], beside: int, elsewhere: int) -> list[tuple[Slot, int]]:
        """Of the slots whose prompts are not issued yet, those that have tokens in the next step, and how many.
        `beside`: tokens of rows that decode in the step; `elsewhere`: those of a step that others decode in."""
        chosen, room = [], self._room(unread, beside, elsewhere)
        for slot in sorted(unread, key=self._next_order()) if unread else []:
            count = min(room, _left(slot)[0])
            if count:
                chosen.append((slot, count))
                room -= count
        return chosen

    def of_range(self, unread: Sequence[Slot], elsewhere: int) -> list[tuple[Slot, int]]:
        """The same for a step on a range: the slot that goes first, and neighbours that fill up its chunk without much
        padding."""
        if not unread:
            return []
        room = self._room(unread, 0, elsewhere)
        ready: Mapping[int, Slot] = {slot.number: slot for slot in unread}
        chosen = [min(unread, key=self._next_order())]
        for side in (1, -1):
            while (neighbour := ready.get(chosen[-1 if side > 0 else 0].number + side)) is not None:
                grown = [*chosen, neighbour] if side > 0 else [neighbour, *chosen]
                if not self._fits(grown, room):
                    break
                chosen = grown
        return [(slot, min(room, _left(slot)[0])) for slot in chosen]

    def _next_order(self) -> Callable[[Slot], tuple[int, int]]:
        self._first_come = not self._first_come
        return age if self._first_come else _left

    def _room(self, unread: Sequence[Slot], beside: int, elsewhere: int) -> int:
        """Tokens of prompts that the next step may have.

        With a step under way for each place that computes, a row waits for as many as there are places, each of which a
        place has for its share of the step's time: for the time of a step, then.
        """
        if self._target is None or not beside + elsewhere:
            return self._chunk
        taken_s = self._times.decoding(beside)
        if not beside:  # what decodes has another step
            taken_s += self._times.decoding(elsewhere)
        tokens = self._times.readable(self._target - taken_s, max(slot.count for slot in unread))
        return min(self._chunk, max(GRAIN, tokens // GRAIN * GRAIN))

    def _fits(self, slots: Sequence[Slot], room: int) -> bool:
        counts = [min(room, _left(slot)[0]) for slot in slots]
        padded = max(counts) * len(slots)
        return (
            padded <= room
            and 3 * padded <= 4 * sum(counts)  # at most a quarter is padding
            and all(slot.count + max(counts) <= self._capacity for slot in slots)
        )


def age(slot: Slot) -> tuple[int, int]:
    """Orders slots in use by when they were given to their continuations."""
    assert slot.continuation is not None
    return slot.continuation.placed_at, slot.number


def _left(slot: Slot) -> tuple[int, int]:
    assert slot.continuation is not None
    return slot.continuation.prefill_length - slot.count, slot.continuation.placed_at

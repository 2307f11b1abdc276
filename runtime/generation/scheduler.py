"""Which tokens of which continuations the stages compute next: continuous batching over cache slots, as plain data.

A continuation and its slot:

    waiting ──admit──> prefill ──the prompt is issued──> decode ──> ended
       └──────────────────┴───────────cancelled or failed──────────┘

The slots of a group are a contiguous range, so that a step's rows are a range of the cache and nothing is copied. Each
group has at most one running decode step, which holds all its decoding rows; with a group for each place that computes,
every place has a group to work on while another's tokens are chosen. Where the device itself draws the tokens, a second
step of the same rows may be issued ahead. Prefill goes in chunks, as many at a time as there are places, so that a long
prompt stalls the others for a chunk at most. Steps are done in the order they were issued, at every
stage: what a slot holds "once the issued steps are done" is therefore known here, at once.

    slot.tokens[:slot.count]  what the slot's cache holds then; kept after its continuation ends, for prompts that begin
                              alike
    slot.made_for[:slot.count]  the kind of row that the keys of these tokens are made for (RowScaling; 0 without)
    continuation.computed     == slot.count while it lives: the tokens issued; the next step begins there
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.bundle.manifest import RowScaling

_UNKNOWN = -1  # a token that the host has not seen: like none of a prompt
MIN_SHARED = 16  # tokens: a shorter common beginning is not worth a copy


@dataclass(eq=False, slots=True)
class Continuation:
    """One choice of a running request: its `tokens` so far, `prompt_length` of which were given.

    `leader` is the choice of the same request whose cache it copies the prompt from; it is admitted after that one.
    """

    tokens: list[int]
    prompt_length: int
    leader: "Continuation | None" = None
    slot: "Slot | None" = None
    computed: int = 0
    shared: int = 0
    """Tokens of the prompt that were found in a cache."""
    placed_at: int = 0
    """The step before which it was given its slot."""
    ended: bool = False
    prefill_length: int = field(init=False)
    """Tokens that prefill computes: those of the prompt, or all that there were when the row outgrew its keys."""

    def __post_init__(self) -> None:
        self.prefill_length = self.prompt_length

    @property
    def prompt_issued(self) -> bool:
        """Whether every token that prefill computes is in a step."""
        return self.computed >= self.prefill_length


@dataclass(eq=False, slots=True)
class Slot:
    """A row of the caches, and what they hold there once the issued steps are done."""

    number: int
    group: int
    tokens: NDArray[np.int64]
    made_by: NDArray[np.int64]
    """The step that computes each of `tokens`, in whichever slot they were computed first."""
    made_for: NDArray[np.int64]
    count: int = 0
    continuation: Continuation | None = None
    used_at: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` tokens of slot `source` go into slot `target`, before the step."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of a step: tokens `start` to `start + count` of a continuation. `last`: its logits are wanted. Its keys
    are made for a row of `row_length` tokens."""

    continuation: Continuation
    slot: int
    start: int
    count: int
    last: bool
    row_length: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the stages do in one go: slots `first_slot` up to `first_slot + slot_count`, `length` tokens wide.

    Rows of slots that are not in `rows` have nothing new.
    """

    number: int
    kind: Literal["prefill", "decode"]
    group: int
    first_slot: int
    slot_count: int
    length: int
    rows: tuple[StepRow, ...]
    copies: tuple[Copy, ...]

    def __str__(self) -> str:
        rows = " ".join(f"{row.slot}:{row.start}+{row.count}" for row in self.rows)
        copies = "".join(f" ({copy.source}>{copy.target}:{copy.tokens})" for copy in self.copies)
        return f"{self.number} {self.kind} {rows}{copies}"


@dataclass(eq=False)
class Scheduler:
    """`slot_count` slots of `capacity` tokens in `groups` ranges; prefill in chunks of at most `chunk` tokens, at most
    `prefills` of them running. `scaling`: how keys depend on the length of a row, if they do."""

    slot_count: int
    capacity: int
    groups: int
    chunk: int
    prefills: int
    scaling: RowScaling | None = None
    waiting: deque[Continuation] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.slots = [
            Slot(number, _group_of(number, self.groups, self.slot_count), *np.zeros((3, self.capacity), np.int64))
            for number in range(self.slot_count)
        ]
        self._decoding = [0] * self.groups  # decode steps of the group that are running
        self._prefilling = 0
        self._clock = 0
        self._steps = 0
        self._copies: list[Copy] = []
        self._prefill_turn = False
        self._turn = 0  # the group whose decode step is looked at first

    def add(self, continuation: Continuation) -> None:
        """Queue a continuation; its tokens fit the capacity."""
        self.waiting.append(continuation)

    def end(self, continuation: Continuation, keep: int | None = None) -> None:
        """Let go of a continuation, whatever its state. What its slot holds stays for others to begin with, or only the
        first `keep` tokens of it, where what follows cannot be trusted."""
        continuation.ended = True
        slot = continuation.slot
        if slot is None:
            if continuation in self.waiting:
                self.waiting.remove(continuation)
            return
        continuation.slot = None
        slot.continuation = None
        slot.used_at = self._tick()
        if keep is not None:
            slot.count = min(slot.count, keep)

    def switch(self, groups: int, prefills: int, forget: bool = False) -> None:
        """Switch to other numbers of groups and prefills, while no step is running. Slots keep what they hold;
        `forget`: no continuation runs, and they hold nothing any more."""
        assert not self._prefilling
        assert not any(self._decoding)
        self.groups, self.prefills, self._decoding, self._turn = groups, prefills, [0] * groups, 0
        for slot in self.slots:
            slot.group = _group_of(slot.number, groups, self.slot_count)
            if forget:
                assert slot.continuation is None
                slot.count = 0
        if forget:
            self._copies = []

    def next(self) -> Step | None:
        """The next step to issue, or None until one is done or a continuation comes."""
        self._admit()
        self._begin_again()
        step = self._decode() or self._prefill()
        self._turn = (self._turn + 1) % self.groups
        return step

    def ahead(self, step: Step, goes_on: Callable[[Continuation], bool]) -> Step | None:
        """The step after a running decode step, for tokens that the device draws in that and the host has not seen.

        It has the same range of slots, and the rows that `goes_on` says will need another token. None where others of
        the group wait for their step, another one is running already, or keys depend on what is not known.
        """
        if step.kind != "decode" or self._decoding[step.group] != 1 or self.scaling is not None:
            return None
        live = [row.continuation for row in step.rows if not row.continuation.ended]
        if any(slot.continuation not in live for slot in self._decodable(step.group)):
            return None
        chosen = [continuation.slot for continuation in live if continuation.slot is not None and goes_on(continuation)]
        if not chosen:
            return None
        self._decoding[step.group] += 1
        rows = [self._issue(slot, 1, last=True) for slot in sorted(chosen, key=lambda slot: slot.number)]
        issued = self._step("decode", step.group, rows, 1)
        return replace(issued, first_slot=step.first_slot, slot_count=step.slot_count)

    def learn(self, continuation: Continuation) -> None:
        """The last of a continuation's tokens is known now; a step that was issued ahead may compute it already."""
        slot, place = continuation.slot, len(continuation.tokens) - 1
        if slot is not None and place < slot.count:
            slot.tokens[place] = continuation.tokens[place]

    def take_back(self, continuation: Continuation) -> None:
        """The last of a continuation's tokens is another than that of the step ahead: it will be computed again."""
        slot = continuation.slot
        if slot is not None:
            slot.count = continuation.computed = min(slot.count, len(continuation.tokens) - 1)

    def done(self, step: Step) -> None:
        """The step has left the last stage, or failed."""
        if step.kind == "decode":
            self._decoding[step.group] -= 1
        else:
            self._prefilling -= 1

    def failed(self, step: Step) -> list[Continuation]:
        """The step has failed in a stage. Forget what it would have left in the caches, with all copies of it, and
        return the continuations that it takes along: its own, and those that continue its tokens."""
        self.done(step)
        lost = []
        for slot in self.slots:
            spoilt = np.flatnonzero(slot.made_by[: slot.count] == step.number)
            if len(spoilt):  # what follows was computed from it
                slot.count = int(spoilt[0])
                if slot.continuation is not None:
                    lost.append(slot.continuation)
        return lost

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(slot.continuation is not None for slot in self.slots)

    @property
    def cache_usage(self) -> float:
        """The share of the caches' places that continuations in slots fill, 0 to 1."""
        filled = sum(slot.count for slot in self.slots if slot.continuation is not None)
        return filled / (self.slot_count * self.capacity)

    # Admission.

    def _admit(self) -> None:
        while self.waiting:
            continuation = self.waiting[0]
            leader = continuation.leader
            if leader is not None and not leader.ended and not leader.prompt_issued:
                return  # first come, first served: those behind wait as well, for a moment
            free = [slot for slot in self.slots if slot.continuation is None]
            if not free:
                return
            self.waiting.popleft()
            self._place(continuation, free)

    def _place(self, continuation: Continuation, free: Sequence[Slot]) -> None:
        prompt = np.array(continuation.tokens, np.int64)
        donor, shared = self._donor(prompt)
        slot = donor if donor is not None and donor.continuation is None else min(free, key=self._placing_cost)
        if donor is not None and slot is not donor:
            self._copies.append(Copy(donor.number, slot.number, shared))
            slot.made_by[:shared] = donor.made_by[:shared]
            slot.made_for[:shared] = donor.made_for[:shared]
        slot.tokens[:shared] = prompt[:shared]
        slot.count = shared
        slot.continuation, continuation.slot = continuation, slot
        continuation.computed = continuation.shared = shared
        continuation.placed_at = self._steps + 1
        slot.used_at = self._tick()

    def _donor(self, prompt: NDArray[np.int64]) -> tuple[Slot | None, int]:
        """The slot that holds most of the prompt's beginning, and how much; the last token is always computed."""
        best: tuple[Slot | None, int] = (None, 0)
        kind = self._kind(len(prompt))
        for slot in self.slots:
            bound = min(slot.count, len(prompt) - 1)
            unlike = np.flatnonzero((slot.tokens[:bound] != prompt[:bound]) | (slot.made_for[:bound] != kind))
            shared = int(unlike[0]) if len(unlike) else bound
            if shared >= MIN_SHARED and (shared, slot.continuation is None) > (best[1], False):
                best = slot, shared
        return best

    def _placing_cost(self, slot: Slot) -> tuple[int, int, int]:
        """Groups evenly full; no idle rows between the busy ones of a group; then the slot unused for longest."""
        busy = [other.number for other in self.slots if other.group == slot.group and other.continuation is not None]
        span = max([*busy, slot.number]) - min([*busy, slot.number]) + 1
        return len(busy), span - len(busy), slot.used_at

    # Steps.

    def _begin_again(self) -> None:
        """Let prefill compute the rows again that have outgrown their keys."""
        if self.scaling is None or self.scaling.longest is None:
            return
        for slot in self.slots:
            continuation = slot.continuation
            if continuation is None or not continuation.prompt_issued:
                continue
            length = len(continuation.tokens)
            if slot.count < length and slot.made_for[slot.count - 1] != self._kind(length):
                slot.count = continuation.computed = 0
                continuation.prefill_length = length

    def _kind(self, length: int) -> int:
        return 0 if self.scaling is None else self.scaling.kind(length)

    def _decode(self) -> Step | None:
        for group in (*range(self._turn, self.groups), *range(self._turn)):
            if self._decoding[group]:
                continue
            rows = [self._issue(slot, 1, last=True) for slot in self._decodable(group)]
            if rows:
                self._decoding[group] += 1
                return self._step("decode", group, rows, 1)
        return None

    def _decodable(self, group: int) -> list[Slot]:
        """The slots of a group whose last token waits for its step."""
        return [
            slot
            for slot in self.slots
            if slot.group == group
            and slot.continuation is not None
            and slot.continuation.prompt_issued
            and slot.continuation.computed < len(slot.continuation.tokens)
        ]

    def _prefill(self) -> Step | None:
        if self._prefilling >= self.prefills:
            return None
        chosen = self._prefill_slots()
        if not chosen:
            return None
        counts = {slot.number: self._chunk_of(slot) for slot in chosen}
        rows = []
        for slot in chosen:
            assert slot.continuation is not None
            count = counts[slot.number]
            rows.append(self._issue(slot, count, last=slot.count + count == slot.continuation.prefill_length))
        self._prefilling += 1
        return self._step("prefill", chosen[0].group, rows, max(counts.values()))

    def _prefill_slots(self) -> list[Slot]:
        """In turn the one admitted first and the one with least left to do, so that neither long prompts nor short ones
        wait for all of the others; and neighbours that fill up its chunk without much padding."""
        ready = {s.number: s for s in self.slots if s.continuation is not None and not s.continuation.prompt_issued}
        if not ready:
            return []
        self._prefill_turn = not self._prefill_turn
        chosen = [min(ready.values(), key=self._age if self._prefill_turn else self._left)]
        for side in (1, -1):
            while (neighbour := ready.get(chosen[-1 if side > 0 else 0].number + side)) is not None:
                grown = [*chosen, neighbour] if side > 0 else [neighbour, *chosen]
                if not self._fits(grown):
                    break
                chosen = grown
        return chosen

    def _age(self, slot: Slot) -> tuple[int, int]:
        assert slot.continuation is not None
        return slot.continuation.placed_at, slot.number

    def _left(self, slot: Slot) -> tuple[int, int]:
        assert slot.continuation is not None
        return slot.continuation.prefill_length - slot.count, slot.continuation.placed_at

    def _fits(self, slots: Sequence[Slot]) -> bool:
        counts = [self._chunk_of(slot) for slot in slots]
        padded = max(counts) * len(slots)
        return (
            padded <= self.chunk
            and 3 * padded <= 4 * sum(counts)  # at most a quarter is padding
            and all(slot.count + max(counts) <= self.capacity for slot in slots)
        )

    def _chunk_of(self, slot: Slot) -> int:
        assert slot.continuation is not None
        return min(self.chunk, slot.continuation.prefill_length - slot.count)

    def _issue(self, slot: Slot, count: int, last: bool) -> StepRow:
        """Take the next `count` tokens of the slot's continuation for computed."""
        continuation = slot.continuation
        assert continuation is not None
        start = slot.count
        row_length = max(continuation.prefill_length, start + count)
        known = continuation.tokens[start : start + count]
        slot.tokens[start : start + count] = known or _UNKNOWN
        slot.made_by[start : start + count] = self._steps + 1
        slot.made_for[start : start + count] = self._kind(row_length)
        slot.count = continuation.computed = start + count
        slot.used_at = self._tick()
        return StepRow(continuation, slot.number, start, count, last, row_length)

    def _step(self, kind: Literal["prefill", "decode"], group: int, rows: Sequence[StepRow], length: int) -> Step:
        self._steps += 1
        first = rows[0].slot
        copies, self._copies = tuple(self._copies), []
        return Step(self._steps, kind, group, first, rows[-1].slot - first + 1, length, tuple(rows), copies)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _group_of(slot: int, groups: int, slots: int) -> int:
    return slot * groups // slots


def chosen_rows(step: Step) -> Iterator[tuple[int, StepRow]]:
    """The rows whose logits are wanted, each with its place in the batch."""
    return ((row.slot - step.first_slot, row) for row in step.rows if row.last)

"""Which tokens of which continuations the stages compute next: continuous batching over cache slots, as plain data.

A continuation and its slot:

    waiting ──admit──> prefill ──the prompt is issued──> decode ──> ended
       │  ^───── set back: there is no room, or it ──────┤           │
       │         has outgrown its keys                   │           │
       └──────────────────┴──────── cancelled or failed ─┴───────────┘

Each group has at most one running step with decoding rows, which holds all that it has; with a group for each place
that computes, every place has a group to work on while another's tokens are chosen. Prefill goes in chunks, as many at
a time as there are places, so that a long prompt stalls the others for a chunk at most. Steps are done in the order
they were issued, at every stage: what a slot holds "once the issued steps are done" is therefore known here, at once.

A step has one of two shapes, which its engines choose (`Engine.packs`):

    packed   the tokens of any rows, one after the other: a group's decoding rows, and beside them a chunk of prompts
    a range  a rectangle of neighbouring slots and their new tokens, so that its caches are a range and nothing is
             copied: the decoding rows of a group, or a chunk of prompts with little padding

The slots of a group are a contiguous range. Where the device itself draws the tokens, a second step of a range's
decoding rows may be issued ahead.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from stageline.runtime.bundle.manifest import RowScaling
from stageline.runtime.generation.blocks import Blocks
from stageline.runtime.generation.chunks import Chunks, age
from stageline.runtime.generation.continuation import Continuation, Slot
from stageline.runtime.generation.decoding import Decoding
from stageline.runtime.generation.slots import BlockSlots, Slots
from stageline.runtime.generation.speculation import Speculation
from stageline.runtime.generation.step_times import StepTimes
from stageline.runtime.generation.steps import Step, StepKind, StepRow, StepRows


@dataclass(eq=False)
class Scheduler:
    """`slot_count` slots of `capacity` tokens in `groups` ranges; prefill in chunks of at most `chunk` tokens, at most
    `prefills` of them running. `packs`: steps are packed tokens. `blocks`: the blocks of the caches, which are enough
    for one row of the capacity; None: each slot has a row to itself. `scaling`: how keys depend on the length of a row,
    if they do. `speculation`: decides how many drafted tokens the decoding rows of a step get; None: there are none.
    `shelves`: rows of the caches beyond those of the slots, for what ended rows held, where caches are not blocks.
    `tpot_target`: seconds that a decoding row may wait for its next token because of prompts, by `times`, which whoever
    runs the steps notes; None: as long as a chunk takes."""

    slot_count: int
    capacity: int
    groups: int
    chunk: int
    prefills: int
    packs: bool = False
    blocks: Blocks | None = None
    scaling: RowScaling | None = None
    speculation: Speculation | None = None
    shelves: int = 0
    tpot_target: float | None = None
    times: StepTimes = field(default_factory=StepTimes)
    waiting: deque[Continuation] = field(default_factory=deque)

    def __post_init__(self) -> None:
        sizes = self.slot_count, self.capacity, self.groups
        self.cache = Slots(*sizes, self.shelves) if self.blocks is None else BlockSlots(*sizes, self.blocks)
        self.slots = self.cache.slots
        self.set_back = 0
        """How often a continuation was set back for want of room."""
        self._decoding = [0] * self.groups  # decode steps of the group that are running
        self._prefilling = 0
        self._steps = 0
        self._chunks = Chunks(self.chunk, self.capacity, self.tpot_target, self.times)
        self._turn = 0  # the group whose decode step is looked at first
        self._kept: dict[int, Decoding] = {}  # of groups, what decodes; until something else happens to a row
        self._all_read = False  # whether no prompt waits to be issued; until then as well

    def add(self, continuation: Continuation) -> None:
        """Queue a continuation, behind those of its priority; its tokens fit the capacity."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > continuation.priority:
            place -= 1
        self.waiting.insert(place, continuation)

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
        self.cache.leave(slot, keep)
        self._changed()

    def switch(self, groups: int, prefills: int, forget: bool = False) -> None:
        """Switch to other numbers of groups and prefills, while no step is running. Slots keep what they hold;
        `forget`: no continuation runs, and they hold nothing any more."""
        assert not self._prefilling
        assert not any(self._decoding)
        self.groups, self.prefills, self._decoding, self._turn = groups, prefills, [0] * groups, 0
        self.cache.regroup(groups)
        self._changed()
        if forget:
            self.cache.forget()

    def next(self) -> Step | None:
        """The next step to issue, or None until one is done or a continuation comes."""
        while True:
            set_back = self.set_back
            self._begin_again()
            self._admit()
            step = self._packed() if self.packs else self._range()
            self._turn = (self._turn + 1) % self.groups
            if step is not None or self.set_back == set_back:
                return step
            # All rows of a group were set back: another one may go on, and nothing else would ask again.

    def ahead(self, step: Step, goes_on: Callable[[Continuation], bool]) -> Step | None:
        """The step after a running decode step, for tokens that the device draws in that and the host has not seen.

        It has the same range of slots, and the rows that `goes_on` says will need another token. None where others of
        the group wait for their step, another one is running already, or keys depend on what is not known.
        """
        if step.kind != "decode" or self._decoding[step.group] != 1 or self.scaling is not None:
            return None
        live = [continuation for continuation in step.arrays.continuations if not continuation.ended]
        if any(slot.continuation not in live for slot in self._decodable(step.group)):
            return None
        chosen = [continuation.slot for continuation in live if continuation.slot is not None and goes_on(continuation)]
        if not chosen:
            return None
        self._decoding[step.group] += 1
        rows = [self._issue(slot, 1, last=True) for slot in sorted(chosen, key=lambda slot: slot.number)]
        issued = self._step("decode", step.group, rows, 1)
        return replace(issued, first_slot=step.first_slot, batch=step.batch)

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
            self._changed()

    def settle(self, continuation: Continuation) -> None:
        """What a step has drawn after a continuation's draft is known: what came of wrong tokens was never computed."""
        continuation.draft = []
        slot = continuation.slot
        if slot is not None:
            self.cache.settle(slot, min(slot.count, len(continuation.tokens) - 1))
            continuation.computed = slot.count
            self._changed()

    def done(self, step: Step) -> None:
        """The step has left the last stage, or failed."""
        for continuation in step.arrays.continuations:
            continuation.flying -= 1
        if step.kind != "prefill":
            self._decoding[step.group] -= 1
        if step.kind != "decode":
            self._prefilling -= 1
            self._changed()

    def failed(self, step: Step) -> list[Continuation]:
        """The step has failed in a stage. Forget what it would have left in the caches, with all copies of it, and
        return the continuations that it takes along: its own, and those that continue its tokens. What decoded beside
        prompts is not taken along: it is computed again."""
        self.done(step)
        self._changed()
        if step.kind == "mixed":
            for row in step.rows:
                slot = row.continuation.slot
                decoded = row.start >= row.continuation.prefill_length
                if slot is not None and decoded and self.cache.rewind(slot, row.start, step.number):
                    row.continuation.computed, row.continuation.draft = row.start, []
        return self.cache.spoilt(step.number)

    def lost(self, step: Step) -> None:
        """The step was lost with its stages; its continuations go on after `replay`."""
        self.done(step)
        for row in step.rows:
            row.continuation.draft = []
            if row.scored:
                until = min(row.start + row.count, row.continuation.prompt_length - 1)
                row.continuation.scored = min(row.continuation.scored, until - row.scored)

    def replay(self) -> None:
        """The stages are others, with empty caches: all that run begin again with their tokens so far, in their order.
        No step is running."""
        running = [slot for slot in self.slots if slot.continuation is not None]
        for slot in sorted(running, key=age, reverse=True):
            self._set_back(slot)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(slot.continuation is not None for slot in self.slots)

    @property
    def cache_usage(self) -> float:
        """The share of the caches' places that continuations in slots fill, 0 to 1."""
        return self.cache.usage

    # Admission.

    def _admit(self) -> None:
        while self.waiting:
            continuation = self.waiting[0]
            leader = continuation.leader
            placed = continuation.placed_at > 0
            if leader is not None and not placed and not leader.ended and not leader.prompt_issued:
                return  # first come, first served: those behind wait as well, for a moment
            kind = self._kind(len(continuation.tokens))
            slot = self.cache.place(continuation.tokens, kind, shares=not continuation.scores)
            if slot is None:
                return
            self.waiting.popleft()
            if not continuation.placed_at:
                continuation.shared = slot.count
            slot.continuation, continuation.slot = continuation, slot
            continuation.computed = slot.count
            continuation.prefill_length = len(continuation.tokens)
            continuation.placed_at = self._steps + 1
            self._changed()

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
                self._set_back(slot)

    def _set_back(self, slot: Slot) -> None:
        """Let the first of those that wait be one that runs, and has no step under way; it begins again."""
        continuation = slot.continuation
        assert continuation is not None
        assert not continuation.flying
        continuation.slot, continuation.computed = None, 0
        self.cache.leave(slot, None)
        self.waiting.appendleft(continuation)
        self._changed()

    def _has_room(self, slot: Slot) -> bool:
        """Make room for a slot's next token, if need be by setting back those that were placed last."""
        while not self.cache.has_room(slot, slot.count + 1):
            idle = [other for other in self.slots if other.continuation is not None and not other.continuation.flying]
            last = max(idle, key=age)
            self._set_back(last)
            self.set_back += 1
            if last is slot:
                return False
        return True

    def _kind(self, length: int) -> int:
        return 0 if self.scaling is None else self.scaling.kind(length)

    def _changed(self) -> None:
        """Something has happened to rows, other than that each one that decodes goes on by a token."""
        self._kept.clear()
        self._all_read = False

    def _packed(self) -> Step | None:
        """All that a group can decode, with a chunk of prompts."""
        group, rows = self._next_group()
        if rows is not None and self.cache.is_short(rows):
            rows = self._with_room(rows)
        if self._prefilling >= self.prefills or self._has_read_all():
            return None if rows is None else self._decode(group, rows)
        decoding = [] if rows is None else self._go_on(rows, self._drafts(rows))
        chosen = self._chunks.packed(self._unread(), sum(row.count for row in decoding), self._elsewhere())
        prompts = [self._read(slot, count) for slot, count in chosen]
        self._decoding[group] += bool(decoding)
        self._prefilling += 1
        return self._step("mixed" if decoding else "prefill", group, [*decoding, *prompts], None)

    def _with_room(self, rows: Decoding) -> Decoding | None:
        """Those of some rows that have room for a token each; the last ones make room for the first."""
        slots = [slot for slot in rows.slots if slot.continuation is not None and self._has_room(slot)]
        if len(slots) == len(rows.slots):
            return rows
        return Decoding.of(slots) if slots else None

    def _has_read_all(self) -> bool:
        self._all_read = self._all_read or not self._unread()
        return self._all_read

    def _drafts(self, rows: Decoding) -> list[int]:
        """How many drafted tokens each row gets, beside prompts as well as without: a token that need not be computed
        later saves what it costs there."""
        none = [0] * len(rows.slots)
        if self.speculation is None or self.scaling is not None:
            return none
        limits = [
            (one.lookup, min(one.most - len(one.tokens), self.capacity - slot.count, self.chunk) - 1)
            for one, slot in zip(rows.continuations, rows.slots, strict=True)
        ]
        counts = self.speculation.counts(limits)
        if not any(counts):
            return none
        if not self.packs:  # all rows of a range are as long as the longest
            room = self.capacity - max(slot.count for slot in rows.slots) - 1
            counts = [min(count, room) for count in counts]
        return [
            count if self.cache.has_room(slot, slot.count + 1 + count) else 0
            for slot, count in zip(rows.slots, counts, strict=True)
        ]

    def _go_on(self, rows: Decoding, drafts: Sequence[int]) -> list[StepRow]:
        """Take the next token of each row for computed, and so many drafted ones after it."""
        issued = []
        for slot, continuation, count in zip(rows.slots, rows.continuations, drafts, strict=True):
            if count:
                assert continuation.lookup is not None
                continuation.draft = continuation.lookup.draft(count)
            issued.append(self._issue(slot, 1 + count, last=True))
        return issued

    def _decode(self, group: int, rows: Decoding) -> Step:
        drafts = self._drafts(rows)
        self._decoding[group] += 1
        if any(drafts):
            return self._step("decode", group, self._go_on(rows, drafts), None if self.packs else 1 + max(drafts))
        self._steps += 1
        starts, tokens = rows.counts, rows.advance()
        kinds = None if self.scaling is None else [self._kind(count) for count in rows.counts.tolist()]
        self.cache.record_each(rows, tokens, self._steps, kinds)
        blocks, size = self.cache.blocks_of_each(rows), self.blocks.size if self.blocks is not None else 0
        arrays = StepRows(
            rows.continuations, rows.numbers, starts, rows.ones, rows.last, rows.counts, tokens, blocks, size
        )
        first = None if self.packs else rows.slots[0].number
        batch = len(rows.slots) if first is None else rows.slots[-1].number - first + 1
        return Step(self._steps, "decode", group, first, batch, 1, arrays, self.cache.take_copies())

    def _next_group(self) -> tuple[int, Decoding | None]:
        """The group whose turn it is of those that can decode, with its rows that do: in the order of their slots, or,
        of packed tokens, the first one first."""
        for group in (*range(self._turn, self.groups), *range(self._turn)):
            if self._decoding[group]:
                continue
            if group not in self._kept:
                slots = self._decodable(group)
                self._kept[group] = Decoding.of(sorted(slots, key=age) if self.packs else slots)
            if self._kept[group].slots:
                return group, self._kept[group]
        return 0, None

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

    def _range(self) -> Step | None:
        """All that a group can decode, else a chunk of prompts."""
        group, rows = self._next_group()
        return self._prefill() if rows is None else self._decode(group, rows)

    def _prefill(self) -> Step | None:
        if self._prefilling >= self.prefills:
            return None
        chosen = self._chunks.of_range(self._unread(), self._elsewhere())
        if not chosen:
            return None
        rows = [self._read(slot, count) for slot, count in chosen]
        self._prefilling += 1
        return self._step("prefill", chosen[0][0].group, rows, max(count for _, count in chosen))

    def _read(self, slot: Slot, count: int) -> StepRow:
        """Take the next `count` tokens of a slot's prompt for computed."""
        assert slot.continuation is not None
        return self._issue(slot, count, last=slot.count + count == slot.continuation.prefill_length)

    def _unread(self) -> list[Slot]:
        """The slots whose prompts are not issued yet, or not whole."""
        return [s for s in self.slots if s.continuation is not None and not s.continuation.prompt_issued]

    def _elsewhere(self) -> int:
        """Rows of a group that decode, if there are any."""
        rows = sum(s.continuation is not None and s.continuation.prompt_issued for s in self.slots)
        return -(-rows // self.groups)

    def _issue(self, slot: Slot, count: int, last: bool) -> StepRow:
        """Take the next `count` tokens of the slot's continuation for computed."""
        continuation = slot.continuation
        assert continuation is not None
        start, end = slot.count, slot.count + count
        row_length = max(continuation.prefill_length, end)
        known = len(continuation.tokens)
        self.cache.record(
            slot, continuation.between(start, end), end, self._steps + 1, self._kind(row_length), min(end, known)
        )
        continuation.computed = end
        continuation.flying += 1
        scored = 0
        if continuation.scores:  # nothing follows the prompt's last token that could be likely or not
            until = min(end, continuation.prompt_length - 1)
            scored = max(0, until - max(start, continuation.scored))
            continuation.scored = max(continuation.scored, until)
        blocks = tuple(self.cache.blocks_of(slot))
        drafted = len(continuation.draft)
        return StepRow(continuation, slot.number, start, count, last, row_length, blocks, scored, drafted)

    def _step(self, kind: StepKind, group: int, rows: Sequence[StepRow], length: int | None) -> Step:
        """Of a range `length` tokens wide, or of packed tokens (None)."""
        self._steps += 1
        self._changed()
        copies = self.cache.take_copies()
        arrays = StepRows.of(rows, 0 if self.blocks is None else self.blocks.size)
        if length is None:
            return Step(self._steps, kind, group, None, int(arrays.counts.sum()), 1, arrays, copies)
        first = rows[0].slot
        return Step(self._steps, kind, group, first, rows[-1].slot - first + 1, length, arrays, copies)

"""The scheduler against a cache of plain numbers: whatever joins, leaves or fails, every row reads its own tokens."""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stageline.runtime.generation.blocks import Blocks
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.inputs import step_inputs
from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.slots import MIN_SHARED
from stageline.runtime.generation.speculation import Speculation
from stageline.runtime.generation.step_times import StepTimes
from stageline.runtime.generation.steps import Step, chosen, scored

GARBAGE = -1  # what a failed step leaves, padding, and anything computed on top of them


class Guesses(Lookup):
    """Drafts at random, of which one token in three is right."""

    def __init__(self, tokens: Sequence[int], seed: int) -> None:
        super().__init__(tokens)
        self.random = random.Random(seed)

    def draft(self, count: int) -> list[int]:
        return [self.random.randrange(3) for _ in range(count)]


class Bold(Speculation):
    """Gives rows drafts of any length, whatever they cost."""

    def __init__(self, seed: int) -> None:
        super().__init__(StepTimes())
        self.random = random.Random(seed)

    def counts(self, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
        return [0 if lookup is None else max(0, min(limit, self.random.randrange(-2, 9))) for lookup, limit in rows]


class Machine:
    """Stages as the scheduler imagines them: a cache, and the steps issued and not done.

    A cell of the cache holds the token that its keys and values were computed from, if all cells before it were right.
    Every choice that has a token drawn goes on with a random one until it has `length` tokens.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0) -> None:
        self.scheduler = scheduler
        blocks = scheduler.blocks
        rows = scheduler.slot_count + scheduler.shelves
        shape = (rows, scheduler.capacity) if blocks is None else (blocks.count, blocks.size)
        self.cache = np.full(shape, GARBAGE)
        self.flying: deque[Step] = deque()
        self.lengths: dict[Continuation, int] = {}
        self.issued: dict[tuple[Continuation, int], int] = {}  # tokens issued since it was placed
        self.finished: list[Continuation] = []
        self.random = random.Random(seed)
        self.steps: list[Step] = []
        self.scored: dict[Continuation, int] = {}  # tokens of its prompt whose logits were asked for

    def add(
        self,
        prompt: Sequence[int],
        length: int,
        leader: Continuation | None = None,
        scores: bool = False,
        priority: int = 0,
    ) -> Continuation:
        tokens = list(prompt)
        lookup = None if self.random.random() < 0.2 else Guesses(tokens, self.random.randrange(99))
        continuation = Continuation(tokens, len(prompt), leader, scores, priority, lookup, most=length)
        self.lengths[continuation] = length
        self.scheduler.add(continuation)
        return continuation

    def issue(self) -> Step | None:
        step = self.scheduler.next()
        if step is not None:
            self.check(step)
            self.flying.append(step)
            self.steps.append(step)
        return step

    def check(self, step: Step) -> None:
        scheduler = self.scheduler
        slots = [row.slot for row in step.rows]
        assert len(slots) == len(set(slots))
        for row in step.rows:
            continuation = row.continuation
            assert not continuation.ended
            assert continuation.slot is scheduler.slots[row.slot]
            placed = continuation, continuation.placed_at
            assert row.start == self.issued.get(placed, row.start)
            assert row.start >= continuation.shared or self.scheduler.set_back
            assert row.start + (row.count if scheduler.packs else step.length) <= scheduler.capacity
            self.issued[placed] = row.start + row.count
            assert row.last == (row.start + row.count == len(continuation.tokens) + row.drafted)
            assert not row.drafted or row.count == 1 + row.drafted
            assert len(continuation.tokens) + row.drafted < self.lengths[continuation]
        self.check_picks(step)
        under_way = [*self.flying, step]
        assert sum(s.kind != "decode" for s in under_way) <= scheduler.prefills
        if step.kind != "prefill":
            assert sum(s.kind != "prefill" and s.group == step.group for s in under_way) == 1
        if scheduler.packs:
            self.check_packed(step)
        else:
            self.check_range(step, slots)

    def check_picks(self, step: Step) -> None:
        """Logits are asked for where they are said to lie, and of a prompt's tokens once in their order."""
        inputs, _ = step_inputs(step)
        asked = inputs["logits_at"]
        tokens = [(row.continuation, row.start + place) for row in step.rows for place in range(row.count)]
        if step.first_slot is None:
            found = [tokens[number] for number in asked[:, 0]]
        else:
            of = {row.slot - step.first_slot: row for row in step.rows}
            found = [
                (of[slot].continuation, of[slot].start + number) if slot in of else None
                for slot, numbers in enumerate(asked.tolist())
                for number in numbers
            ]
        wanted = [row for row in step.rows if row.last]
        for (place, continuation), row in zip(chosen(step), wanted, strict=True):
            end = row.start + row.count
            assert continuation is row.continuation
            assert found[place : place + 1 + row.drafted] == [
                (continuation, number) for number in range(end - 1 - row.drafted, end)
            ]
        for continuation, first, places in scored(step):
            assert continuation.scores
            assert first == self.scored.get(continuation, 0) + 1
            self.scored[continuation] = first + places.stop - places.start - 1
            before = range(first - 1, self.scored[continuation])
            assert found[places] == [(continuation, place) for place in before]

    def check_packed(self, step: Step) -> None:
        assert (step.first_slot, step.batch, step.length) == (None, sum(row.count for row in step.rows), 1)
        prompts = [row for row in step.rows if row.start < row.continuation.prefill_length]
        decoding = [row for row in step.rows if row not in prompts]
        assert step.kind == ("mixed" if prompts and decoding else "prefill" if prompts else "decode")
        assert sum(row.count for row in prompts) <= self.scheduler.chunk
        assert {row.count - row.drafted for row in decoding} <= {1}
        assert {self.scheduler.slots[row.slot].group for row in decoding} <= {step.group}

    def check_range(self, step: Step, slots: Sequence[int]) -> None:
        scheduler = self.scheduler
        assert slots == sorted(slots)
        assert (step.first_slot, step.batch) == (slots[0], slots[-1] - slots[0] + 1)
        assert step.length == max(row.count for row in step.rows)
        if step.kind == "decode":
            assert {row.count - row.drafted for row in step.rows} == {1}
            assert {scheduler.slots[slot].group for slot in range(slots[0], slots[-1] + 1)} == {step.group}
        else:
            assert slots == list(range(slots[0], slots[-1] + 1))
            assert step.length * step.batch <= scheduler.chunk

    def complete(self, failing: bool = False) -> Step:
        """The oldest step leaves the last stage."""
        step = self.flying.popleft()
        for copy in step.copies:
            self.cache[copy.target, : copy.tokens] = self.cache[copy.source, : copy.tokens]
        for row in step.rows:
            held = self.held(row.slot, row.blocks)
            given_tokens = np.array(row.continuation.between(0, row.start + row.count))
            right = bool((held[: row.start] == given_tokens[: row.start]).all())
            assert right or row.continuation.ended, f"{step}: slot {row.slot} does not hold what it continues"
            held[row.start : row.start + (row.count if step.first_slot is None else step.length)] = GARBAGE
            if right and not failing:
                held[row.start : row.start + row.count] = given_tokens[row.start :]
            if self.scheduler.blocks is not None:
                self.cache[list(row.blocks)] = held.reshape(len(row.blocks), -1)
        if failing:
            living = [row for row in step.rows if not row.continuation.ended]
            lost = self.scheduler.failed(step)
            for row in living:
                if row.continuation not in lost:
                    assert step.kind == "mixed"
                    assert row.start >= row.continuation.prefill_length
                    self.issued[row.continuation, row.continuation.placed_at] = row.start
            for continuation in lost:
                self.scheduler.end(continuation)
                del self.lengths[continuation]
        else:
            self.scheduler.done(step)
            self.scheduler.times.note(step, 0.01 + 0.001 * step.batch * step.length)
            for _, continuation in chosen(step):
                self.go_on(continuation)
        return step

    def go_on(self, continuation: Continuation) -> None:
        """Draw a token, and those after it that the step has computed for the draft before them."""
        depth = 0
        while not continuation.ended:
            self.draw(continuation)
            if not continuation.goes_as_drafted(depth, continuation.tokens[-1]):
                break
            depth += 1
        if continuation.draft and not continuation.ended:
            self.scheduler.settle(continuation)
            self.issued[continuation, continuation.placed_at] = continuation.computed
            assert continuation.computed == len(continuation.tokens) - 1

    def held(self, slot: int, blocks: Sequence[int]) -> Any:
        """What the row of a slot holds: of a slot's own row a view, of blocks a copy."""
        return self.cache[slot] if self.scheduler.blocks is None else self.cache[list(blocks)].reshape(-1)

    def draw(self, continuation: Continuation) -> None:
        continuation.tokens.append(self.random.randrange(3))
        if len(continuation.tokens) == self.lengths[continuation]:
            computed = self.issued[continuation, continuation.placed_at]
            assert len(continuation.tokens) - 1 <= computed <= len(continuation.tokens) + len(continuation.draft)
            self.scheduler.end(continuation)
            self.finished.append(continuation)
            if continuation.scores:
                assert continuation.shared == 0
                assert self.scored.get(continuation, 0) == continuation.prompt_length - 1
            del self.lengths[continuation]

    def cancel(self, continuation: Continuation, keep: int | None = None) -> None:
        self.scheduler.end(continuation, keep)
        del self.lengths[continuation]

    def settle(self) -> int:
        """Run until nothing is left to do; how many steps that took."""
        count = 0
        while True:
            while self.issue() is not None:
                pass
            if not self.flying:
                break
            self.complete()
            count += 1
            assert count < 100_000
        assert not self.lengths, "a continuation was forgotten"
        self.check_slots()
        return count

    def check_slots(self) -> None:
        """With no step running, a slot holds what the scheduler takes it to hold, once copies that wait for a step are
        made: they wait when the continuation that wanted one has ended before its first step."""
        if self.scheduler.blocks is not None:
            self.check_blocks(self.scheduler.blocks)
            return
        cache = self.cache.copy()
        for copy in self.scheduler.cache._copies:
            cache[copy.target, : copy.tokens] = cache[copy.source, : copy.tokens]
        for slot in self.scheduler.cache._all:
            np.testing.assert_array_equal(cache[slot.number, : slot.count], slot.tokens[: slot.count])

    def check_blocks(self, blocks: Blocks) -> None:
        """What can be found is there, and nothing is left in use. A failed step's blocks leave some behind that come
        after them: these are not found, since nothing has the number of what was before them."""
        parents, found = {0}, dict(blocks._found)
        while reached := [key for key in found if key[0] in parents]:
            for key in reached:
                block = found.pop(key)
                np.testing.assert_array_equal(self.cache[block], key[2])
                parents.add(blocks._number[block])
        assert blocks.free == blocks.count


class AnyOrder(RuleBasedStateMachine):
    """Requests join, steps are issued and done or fail, requests are cancelled, in whatever order."""

    machine: Machine

    @initialize(
        slots=st.integers(1, 6), groups=st.integers(1, 3), chunk=st.sampled_from([1, 5, 16, 64]),
        prefills=st.integers(1, 3), capacity=st.integers(24, 72), packs=st.booleans(),
        block=st.sampled_from([None, 1, 4, 16]), more=st.integers(0, 30), seed=st.integers(0, 99), drafts=st.booleans(),
        tpot=st.sampled_from([None, None, 0.03]), shelves=st.sampled_from([0, 1, 3]),
    )  # fmt: skip
    def begin(
        self, slots: int, groups: int, chunk: int, prefills: int, capacity: int, packs: bool, block: int | None,
        more: int, seed: int, drafts: bool, tpot: float | None, shelves: int,
    ) -> None:  # fmt: skip
        blocks = Blocks(-(-capacity // block) + more, block) if packs and block else None
        sizes = slots, capacity, min(groups, slots), min(chunk, capacity), prefills
        speculation = Bold(seed) if drafts else None
        scheduler = Scheduler(
            *sizes, packs, blocks, speculation=speculation, shelves=0 if blocks else shelves, tpot_target=tpot
        )
        self.machine = Machine(scheduler, seed)

    @rule(
        common=st.integers(0, 60), kind=st.integers(0, 1), own=st.integers(0, 20), more=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]), scores=st.booleans(), priority=st.sampled_from([0, 0, 0, -1, 2]),
    )  # fmt: skip
    def add(self, common: int, kind: int, own: int, more: int, n: int, scores: bool, priority: int) -> None:
        machine = self.machine
        tail = [machine.random.randrange(3) for _ in range(own)]
        prompt = ([kind] * common + tail or [0])[: machine.scheduler.capacity]
        length = min(len(prompt) + more, machine.scheduler.capacity + 1)
        leader = machine.add(prompt, length, None, scores, priority)
        for _ in range(n - 1):
            machine.add(prompt, length, leader, False, priority)

    @rule()
    def issue(self) -> None:
        self.machine.issue()

    @precondition(lambda self: self.machine.flying)
    @rule()
    def complete(self) -> None:
        self.machine.complete()

    @precondition(lambda self: self.machine.flying)
    @rule()
    def fail(self) -> None:
        self.machine.complete(failing=True)

    @precondition(lambda self: self.machine.lengths)
    @rule(which=st.integers(0, 99), keep=st.sampled_from([None, None, 0, 20]))
    def cancel(self, which: int, keep: int | None) -> None:
        alive = list(self.machine.lengths)
        self.machine.cancel(alive[which % len(alive)], keep)

    @precondition(lambda self: not self.machine.flying)
    @rule(groups=st.integers(1, 3), prefills=st.integers(1, 3))
    def regroup(self, groups: int, prefills: int) -> None:
        self.machine.scheduler.switch(min(groups, self.machine.scheduler.slot_count), prefills)

    @precondition(lambda self: not self.machine.flying and not self.machine.scheduler.running)
    @rule(groups=st.integers(1, 3))
    def forget(self, groups: int) -> None:
        if any(continuation.placed_at for continuation in self.machine.scheduler.waiting):
            return  # set back
        self.machine.scheduler.switch(min(groups, self.machine.scheduler.slot_count), 1, forget=True)
        self.machine.cache[:] = GARBAGE

    @invariant()
    def a_slot_serves_one(self) -> None:
        for slot in self.machine.scheduler.slots:
            if slot.continuation is not None:
                assert not slot.continuation.ended
                assert slot.continuation.slot is slot
        assert self.machine.scheduler.running == sum(c.slot is not None for c in self.machine.lengths)

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.settle()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_under_load_every_row_reads_its_own_tokens(seed: int) -> None:
    """Longer runs than `AnyOrder` makes: hundreds of requests with few different beginnings."""
    rng = random.Random(seed)
    slots, capacity = rng.randint(1, 8), rng.choice([40, 100])
    groups, chunk, prefills = rng.randint(1, slots), rng.choice([3, 16, 40]), rng.randint(1, 3)
    blocks = Blocks(capacity // 5 + rng.randint(0, 20), 5) if rng.random() < 0.5 else None
    packs = blocks is not None or rng.random() < 0.5
    shelves = rng.choice([0, 2, 9]) if blocks is None else 0
    scheduler = Scheduler(slots, capacity, groups, chunk, prefills, packs, blocks, shelves=shelves)
    scheduler.speculation = Bold(seed) if rng.random() < 0.5 else None
    machine = Machine(scheduler, seed)
    beginnings = [[rng.randrange(3) for _ in range(rng.randint(0, 35))] for _ in range(3)]
    for _ in range(600):
        choice = rng.random()
        if choice < 0.15:
            prompt = rng.choice(beginnings) + [rng.randrange(3) for _ in range(rng.randint(1, 5))]
            leader = machine.add(prompt, len(prompt) + rng.randint(1, 20 if capacity == 100 else 1))
            for _ in range(rng.choice([0, 0, 2])):
                machine.add(prompt, machine.lengths[leader], leader)
        elif choice < 0.6:
            machine.issue()
        elif choice < 0.95 and machine.flying:
            machine.complete(failing=rng.random() < 0.05)
        elif machine.lengths:
            machine.cancel(rng.choice(list(machine.lengths)))
    machine.settle()


def alone(
    slots: int = 4,
    groups: int = 1,
    chunk: int = 16,
    prefills: int = 1,
    capacity: int = 2000,
    packs: bool = False,
    blocks: Blocks | None = None,
) -> Machine:
    return Machine(Scheduler(slots, capacity, groups, chunk, prefills, packs, blocks))


def settle_but(machine: Machine, steps: int) -> None:
    """The machine after `steps` steps, one at a time."""
    for _ in range(steps):
        assert machine.issue()
        machine.complete()


def test_a_prompt_goes_in_chunks_and_then_token_by_token() -> None:
    machine = alone()
    machine.add(range(40), 43)
    machine.settle()
    assert [str(step) for step in machine.steps] == [
        "1 prefill 0:0+16",
        "2 prefill 0:16+16",
        "3 prefill 0:32+8",
        "4 decode 0:40+1",
        "5 decode 0:41+1",
    ]
    assert [row.last for step in machine.steps for row in step.rows] == [False, False, True, True, True]


def test_short_prompts_share_a_step() -> None:
    machine = alone()
    for length in (3, 4, 4, 4):
        machine.add(range(length), length + 2)
    machine.settle()
    assert [str(step) for step in machine.steps] == [
        "1 prefill 0:0+3 1:0+4 2:0+4 3:0+4",
        "2 decode 0:3+1 1:4+1 2:4+1 3:4+1",
    ]


def test_packed_steps_mix_prompts_of_any_length_with_what_decodes() -> None:
    machine = alone(packs=True)
    machine.add(range(3), 6)
    settle_but(machine, 1)
    for length in (20, 9, 1):
        machine.add(range(length), length + 2)
    machine.settle()
    assert [str(step) for step in machine.steps] == [
        "1 prefill 0:0+3",
        "2 mixed 0:3+1 3:0+1 2:0+9 1:0+6",
        "3 mixed 0:4+1 2:9+1 3:1+1 1:6+14",
        "4 decode 1:20+1",
    ]
    assert [step.batch for step in machine.steps] == [3, 17, 17, 1]


def test_rows_have_drafts_beside_a_prompt_and_go_on_with_what_was_right() -> None:
    scheduler = Scheduler(4, 2000, 1, 16, 1, packs=True)
    machine = Machine(scheduler, seed=1)
    talker = machine.add([1, 2], 500)
    settle_but(machine, 1)
    talker.lookup, scheduler.speculation = Guesses(talker.tokens, 1), Bold(1)
    machine.add(range(800), 802)
    while len(machine.steps) < 40:
        machine.issue()
        machine.complete()
    mixed = [step for step in machine.steps if step.kind == "mixed"]
    drafted = [row.drafted for step in mixed for row in step.rows if row.continuation is talker]
    assert len(mixed) == 39
    assert sum(drafted) > 39
    assert len(talker.tokens) > 2 + 39
    assert {sum(row.count for row in step.rows if row.continuation is not talker) for step in mixed} == {16}


def test_a_packed_step_of_each_group_is_under_way_and_a_long_prompt_fills_both() -> None:
    machine = alone(slots=4, groups=2, prefills=2, packs=True)
    for _ in range(2):
        machine.add(range(3), 100)
    settle_but(machine, 2)
    machine.add(range(100), 110)
    while machine.issue():
        pass
    assert [(step.kind, len(step.rows), step.batch) for step in machine.flying] == [("mixed", 2, 17), ("mixed", 2, 17)]


def test_rows_that_begin_alike_share_blocks_and_compute_what_follows() -> None:
    machine = alone(packs=True, blocks=Blocks(100, 8), capacity=100)
    first = machine.add(range(40), 50)
    settle_but(machine, 3)
    twins = [machine.add([*range(35), 7], 40) for _ in range(2)]
    machine.settle()
    again = machine.add(range(41), 45)
    machine.settle()
    assert [continuation.shared for continuation in (first, *twins, again)] == [0, 32, 32, 40]
    assert not any(step.copies for step in machine.steps)


def test_the_last_is_set_back_where_there_is_no_block_for_the_first() -> None:
    machine = alone(slots=3, packs=True, blocks=Blocks(8, 8), capacity=64)
    first, second = machine.add([1] * 20, 60), machine.add([2] * 20, 60)
    machine.settle()
    assert machine.scheduler.set_back > 0
    assert machine.finished == [first, second]
    assert len(second.tokens) == 60


@pytest.mark.parametrize("more", range(5))
def test_a_group_that_is_set_back_does_not_stop_the_others(more: int) -> None:
    machine = Machine(Scheduler(2, 40, 2, 64, 1, True, Blocks(40 + more, 1)), more)
    for kind in range(4):
        machine.add([kind] * (10 + kind), 30)
    while machine.lengths:
        while machine.issue():
            pass
        assert machine.flying, "nothing would ever be issued again"
        while machine.flying:
            machine.complete()
    assert machine.scheduler.set_back


def test_admission_waits_for_blocks() -> None:
    machine = alone(slots=8, packs=True, blocks=Blocks(10, 8), capacity=64)
    for n in range(4):
        machine.add([n] * 30, 32)
    machine.issue()
    assert machine.scheduler.running == 2  # of 4 blocks each, and there is one left for the growth of each
    machine.settle()
    assert len(machine.finished) == 4
    assert not machine.scheduler.set_back


def test_each_group_has_a_decode_step_under_way() -> None:
    machine = alone(slots=4, groups=2, prefills=2)
    for _ in range(4):
        machine.add(range(3), 100)
    while not all(continuation.prompt_issued for continuation in machine.lengths) or machine.flying:
        while machine.issue():
            pass
        if all(len(c.tokens) > c.prompt_length for c in machine.lengths):
            break
        machine.complete()
    while any(step.kind == "prefill" for step in machine.flying):
        machine.complete()
    while machine.issue():
        pass
    assert sorted((step.group, step.batch) for step in machine.flying) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("prefills", [1, 2])
def test_a_long_prompt_does_not_starve_short_ones_nor_they_it(prefills: int) -> None:
    machine = alone(slots=3, chunk=16, prefills=prefills)
    long = machine.add(range(1600), 1602)
    short: list[tuple[Continuation, int]] = []
    while not long.prompt_issued:
        if sum(not continuation.ended for continuation, _ in short) < 2:
            short.append((machine.add([7] * 5, 7), len(machine.steps)))
        while machine.issue():
            pass
        machine.complete()
    of_long = [step.number for step in machine.steps if any(row.continuation is long for row in step.rows)]
    assert len(of_long) == 100
    assert sum(step.kind == "prefill" for step in machine.steps) <= 2 * len(of_long) + 2
    assert len(short) > 50
    firsts = {row.continuation: s.number for s in reversed(machine.steps) for row in s.rows if row.last}
    waits = [firsts[continuation] - begun for continuation, begun in short if continuation in firsts]
    assert max(waits) <= 4 + prefills


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    machine = alone()
    talker = machine.add([1, 2], 500)
    settle_but(machine, 3)
    machine.add(range(800), 802)
    for _ in range(60):
        while machine.issue():
            pass
        machine.complete()
    kinds = [step.kind for step in machine.steps[3:]]
    assert abs(kinds.count("decode") - kinds.count("prefill")) <= 2
    assert len(talker.tokens) >= 30


def test_first_come_first_served() -> None:
    machine = alone(slots=1)
    order = [machine.add([n] * 3, 5) for n in range(5)]
    machine.settle()
    assert machine.finished == order


def test_choices_copy_the_prompt_of_the_first() -> None:
    machine = alone(slots=3)
    leader = machine.add(range(40), 42)
    others = [machine.add(range(40), 42, leader) for _ in range(4)]
    machine.settle()
    assert [continuation.shared for continuation in (leader, *others)] == [0, 39, 39, 39, 39]
    assert sum(row.count for step in machine.steps for row in step.rows if step.kind == "prefill") == 40 + 4


def test_choices_of_a_leader_that_is_gone_do_not_wait_for_it() -> None:
    machine = alone(slots=3)
    leader = machine.add(range(100), 102)
    follower = machine.add(range(100), 102, leader)
    settle_but(machine, 1)
    assert follower.slot is None
    machine.cancel(leader)
    machine.settle()
    assert machine.finished == [follower]
    assert follower.shared == 16  # what was there of the leader's


def test_a_common_beginning_is_copied_from_one_that_runs_and_taken_over_from_one_that_ended() -> None:
    machine = alone(slots=2)
    system = list(range(50))
    running = machine.add([*system, 90], 500)
    settle_but(machine, 4)
    beside = machine.add([*system, 91, 92], 54)
    copies = machine.issue()
    assert copies is not None
    assert [(c.source, c.target, c.tokens) for c in copies.copies] == [(0, 1, 50)]
    assert beside.shared == 50
    while not beside.ended:
        while machine.issue():
            pass
        machine.complete()
    after = machine.add([*beside.tokens[:53], 3, 4, 5], 57)
    while not after.ended:
        while machine.issue():
            pass
        machine.complete()
    assert after.shared == 53
    assert not any(step.copies for step in machine.steps[copies.number :])
    assert not running.ended


def test_what_ended_is_kept_on_shelves_the_one_unused_for_longest_leaves_first() -> None:
    machine = Machine(Scheduler(2, 400, 1, 64, 1, shelves=3))
    talks = {number: [number] * 30 for number in range(7)}

    def turn(number: int) -> bool:
        """A conversation goes on; whether all that was computed of it before is found."""
        before = len(talks[number]) - 1
        one = machine.add([*talks[number], *range(5)], len(talks[number]) + 9)
        machine.settle()
        talks[number] = list(one.tokens)
        assert one.shared in (0, before)
        return one.shared == before

    assert not any(turn(number) for number in range(4))
    assert all(turn(number) for number in (0, 1, 2, 3, 3, 0, 2, 1))
    assert not any(turn(number) for number in (4, 5, 6))
    assert [turn(number) for number in (1, 2, 6, 5)] == [True, False, True, True]


@pytest.mark.parametrize("common", [MIN_SHARED - 1, MIN_SHARED])
def test_a_short_common_beginning_is_computed_again(common: int) -> None:
    machine = alone()
    machine.add([1] * common + [2], common + 3)
    machine.settle()
    second = machine.add([1] * common + [0], common + 3)
    machine.settle()
    assert second.shared == (common if common == MIN_SHARED else 0)


def test_the_slot_unused_for_longest_is_given_away_first() -> None:
    machine = alone(slots=3)
    prompts = [[n] * 30 for n in range(4)]
    for prompt in prompts[:3]:
        machine.add(prompt, 31)
        machine.settle()
    again = machine.add(prompts[0], 31)  # now the second is the oldest
    machine.settle()
    machine.add(prompts[3], 31)
    machine.settle()
    kept = [machine.add(prompts[n], 31) for n in (0, 2)]
    machine.settle()
    assert [continuation.shared for continuation in (again, *kept)] == [29, 29, 29]


def test_nothing_computed_on_a_failed_step_survives() -> None:
    """A prefix passes from hand to hand before the step that made it turns out to have failed."""
    machine = alone(slots=3, prefills=3, chunk=64)
    prefix = [1] * 20
    first = machine.add([*prefix, 2], 25)
    machine.issue()
    second = machine.add([*prefix, 3], 25)
    copied = machine.issue()
    assert copied is not None
    assert copied.copies
    machine.cancel(second)
    third = machine.add([*prefix, 3, 4], 25)
    unlike = machine.add([5] * 20, 25)
    machine.issue()
    assert (second.shared, third.shared, unlike.shared) == (20, 21, 0)
    machine.complete(failing=True)
    assert first.ended
    assert third.ended
    assert not unlike.ended
    fourth = machine.add([*prefix, 3, 4], 25)
    machine.settle()
    assert fourth.shared == 0
    assert set(machine.finished) == {unlike, fourth}


def test_what_was_there_before_a_failed_step_is_kept() -> None:
    machine = alone(slots=2)
    machine.add([1] * 30, 32)
    machine.settle()
    failing = machine.add([*[1] * 30, 2], 40)
    machine.issue()
    machine.complete(failing=True)
    assert failing.ended
    again = machine.add([*[1] * 30, 2], 40)
    machine.settle()
    assert again.shared == 30


def test_a_waiting_continuation_can_be_cancelled() -> None:
    machine = alone(slots=1)
    first, second = machine.add([1], 5), machine.add([2], 5)
    settle_but(machine, 2)
    machine.cancel(second)
    machine.settle()
    assert machine.finished == [first]
    assert not machine.scheduler.waiting


def test_other_groups_go_on_where_the_slots_were() -> None:
    scheduler = Scheduler(4, 40, 2, 8, prefills=2)
    machine = Machine(scheduler)
    for seed in range(4):
        machine.add([seed] * 5, 12)
    while any(len(continuation.tokens) < 8 for continuation in machine.lengths):
        while machine.issue() is not None:
            pass
        machine.complete()
    while machine.flying:
        machine.complete()
    scheduler.switch(1, prefills=1)
    step = machine.issue()
    assert step is not None
    assert (step.kind, [row.slot for row in step.rows]) == ("decode", [0, 1, 2, 3])
    machine.settle()
    assert len(machine.finished) == 4


def test_those_that_wait_go_by_priority_then_as_they_came() -> None:
    machine = Machine(Scheduler(1, 64, 1, 64, 1))
    running = machine.add([1] * 5, 8)
    machine.issue()
    wanted = [machine.add([2] * 5, 8, None, False, priority) for priority in (0, 3, -1, 0, 3, -1)]
    machine.settle()
    order = [wanted[i] for i in (2, 5, 0, 3, 1, 4)]
    assert machine.finished == [running, *order]

"""Where keys depend on the length of their row, the scheduler gives every row keys that were made for its length."""

import random

import pytest
from stageline.runtime.bundle.manifest import RowScaling
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.steps import Step, chosen

LIMIT = 40
TWO_KINDS = RowScaling(shortest=LIMIT, longest=LIMIT + 1)
EACH_ITS_OWN = RowScaling(shortest=LIMIT)


class Cache:
    """What the stages would hold: in each cell of a slot, the token, and the length of the row its key is made for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cells: list[list[tuple[int, int]]] = [[(-1, -1)] * scheduler.capacity for _ in scheduler.slots]
        self.steps: list[Step] = []

    def run(self, lengths: dict[Continuation, int]) -> None:
        """Until each continuation has its length."""
        for continuation in lengths:
            self.scheduler.add(continuation)
        while (step := self.scheduler.next()) is not None:
            self.steps.append(step)
            for copy in step.copies:
                self.cells[copy.target][: copy.tokens] = self.cells[copy.source][: copy.tokens]
            for row in step.rows:
                end = row.start + row.count
                for place in range(row.start, end):
                    self.cells[row.slot][place] = (row.continuation.tokens[place], row.row_length)
                assert [token for token, _ in self.cells[row.slot][:end]] == row.continuation.tokens[:end]
            self.scheduler.done(step)
            for _, continuation in chosen(step):
                assert continuation.slot is not None
                self.check(continuation, self.cells[continuation.slot.number])
                continuation.tokens.append(random.randrange(3))
                if len(continuation.tokens) >= lengths[continuation]:
                    self.scheduler.end(continuation)

    def check(self, continuation: Continuation, cells: list[tuple[int, int]]) -> None:
        length = len(continuation.tokens)
        made_for = [row_length for _, row_length in cells[:length]]
        if self.scheduler.scaling is TWO_KINDS:  # as if the whole row were computed at once
            assert {row_length > LIMIT for row_length in made_for} == {length > LIMIT}
        else:  # as transformers' cache: the prompt's keys for the prompt, each later one for the row that it ends
            prompt = continuation.prompt_length
            wanted = [max(prompt, place + 1) for place in range(length)]
            assert [max(LIMIT, n) for n in made_for] == [max(LIMIT, n) for n in wanted]


@pytest.mark.parametrize("scaling", [TWO_KINDS, EACH_ITS_OWN], ids=["two kinds", "each its own"])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_the_keys_of_its_length(scaling: RowScaling, seed: int) -> None:
    random.seed(seed)
    cache = Cache(Scheduler(3, 120, groups=2, chunk=16, prefills=2, scaling=scaling))
    common = [random.randrange(3) for _ in range(100)]
    for _ in range(4):
        prompts = [common[: random.randrange(1, 90)] + [random.randrange(3)] for _ in range(4)]
        cache.run({Continuation(list(p), len(p)): len(p) + random.randrange(1, 25) for p in prompts})


def test_a_row_that_outgrows_its_keys_is_computed_again_in_chunks() -> None:
    cache = Cache(Scheduler(1, 120, groups=1, chunk=32, prefills=1, scaling=TWO_KINDS))
    cache.run({Continuation([1] * 38, 38): 43})
    assert [str(step) for step in cache.steps] == [
        "1 prefill 0:0+32",
        "2 prefill 0:32+6",
        "3 decode 0:38+1",
        "4 decode 0:39+1",
        "5 prefill 0:0+32",
        "6 prefill 0:32+9",
        "7 decode 0:41+1",
    ]
    assert [step.rows[0].row_length for step in cache.steps] == [38, 38, 39, 40, 41, 41, 42]


def test_prompts_of_one_kind_still_share_their_beginning() -> None:
    cache = Cache(Scheduler(1, 120, groups=1, chunk=64, prefills=1, scaling=TWO_KINDS))
    shared = []
    for length in (60, 55, 30, 35):
        continuation = Continuation(list(range(length)), length)
        cache.run({continuation: length + 1})
        shared.append(continuation.shared)
    assert shared == [0, 54, 0, 30]

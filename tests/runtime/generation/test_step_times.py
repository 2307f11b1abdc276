"""What steps take is learnt from them: a known time is found again, and bounds what a step reads of prompts."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.generation.chunks import GRAIN
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.step_times import StepTimes
from stageline.runtime.generation.steps import Step, StepRow, StepRows, chosen


def test_the_time_of_a_token_is_learnt_from_steps() -> None:
    times = StepTimes()
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choice([1, 2, 5, 9])
        times.note_decoding(tokens, (0.04 + 0.003 * tokens) * rng.uniform(0.95, 1.05))
    base, each = times.line()
    assert base == pytest.approx(0.04, rel=0.1)
    assert each == pytest.approx(0.003, rel=0.25)


def test_before_steps_differ_a_token_adds_a_tenth() -> None:
    times = StepTimes()
    assert times.line() == (0.9, 0.1)
    for _ in range(100):
        times.note_decoding(1, 0.05)
    base, each = times.line()
    assert (base, each) == (pytest.approx(0.045), pytest.approx(0.005))


def read(*chunks: tuple[int, int], decoding: int = 0) -> Step:
    """A step that reads chunks of prompts, (tokens before, tokens), beside rows that decode."""
    rows = [StepRow(Continuation([1] * 9, 8), n, 8, 1, True, 9) for n in range(decoding)]
    rows += [StepRow(Continuation([1] * 4000, 4000), 50 + n, *chunk, False, 0) for n, chunk in enumerate(chunks)]
    return Step(1, "mixed" if decoding else "prefill", 0, None, 1, 1, StepRows.of(rows, 0), ())


def test_what_tokens_of_prompts_take_by_those_before_them_is_learnt_beside_any_rows() -> None:
    times = StepTimes()
    assert times.readable(1.0, 0) > 10**6
    rng = random.Random(1)

    def reading_s(past: int, tokens: int) -> float:
        return tokens * (0.002 + 0.000004 * (past + tokens / 2))

    for _ in range(60):
        times.note_decoding(rows := rng.randrange(1, 8), 0.03 + 0.002 * rows)
    for _ in range(60):
        chunks = [(rng.randrange(2000), rng.randrange(8, 128)) for _ in range(rng.choice([1, 2]))]
        rows = rng.choice([0, 3, 7])
        seconds = 0.03 + 0.002 * rows + sum(reading_s(*chunk) for chunk in chunks)
        times.note(read(*chunks, decoding=rows), seconds * rng.uniform(0.98, 1.02))
    for past, tokens in [(0, 20), (0, 100), (1500, 50)]:
        assert times.readable(reading_s(past, tokens), past) == pytest.approx(tokens, rel=0.15)
    assert times.readable(0.0, 100) == times.readable(-1.0, 100) == 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6), base=st.sampled_from([0.005, 0.03]), each=st.sampled_from([0.0005, 0.002]),
    reading=st.sampled_from([0.0003, 0.002]), dearer=st.sampled_from([0.0, 0.0007]),
    target=st.sampled_from([None, 0.06, 0.1]), packs=st.booleans(),
)  # fmt: skip
def test_no_row_waits_longer_for_a_prompt_than_it_may(
    rows: int, base: float, each: float, reading: float, dearer: float, target: float | None, packs: bool
) -> None:
    """Stages of known time, one step after the other; `dearer`: by how much a token is with each one before it."""
    later = reading * dearer
    scheduler = Scheduler(8, 2000, 1, 128, 1, packs, tpot_target=target)
    now, last, waits, flying = 0.0, dict[Continuation, float](), list[float](), deque[Step]()

    def run() -> int:
        """A step; how many tokens of prompts it reads."""
        nonlocal now
        while (step := scheduler.next()) is not None:
            flying.append(step)
        step = flying.popleft()
        prompts = [row for row in step.rows if row.start < row.continuation.prefill_length]
        decoding = sum(row.count for row in step.rows) - sum(row.count for row in prompts)
        taken_s = base + each * decoding
        taken_s += sum(row.count * (reading + later * (row.start + row.count / 2)) for row in prompts)
        now += taken_s
        scheduler.times.note(step, taken_s)
        scheduler.done(step)
        for _, continuation in chosen(step):
            continuation.tokens.append(1)
            if continuation in last:
                waits.append(now - last[continuation])
            last[continuation] = now
        return sum(row.count for row in prompts)

    for number in range(rows):
        scheduler.add(Continuation([number] * 40, 40))
    for _ in range(30):
        run()
    waits.clear()
    long = Continuation([9] * 1500, 1500)
    scheduler.add(long)
    read = [run()]
    while not long.prompt_issued:
        read.append(run())
    full = [tokens for tokens in read[:-1] if tokens]
    if target is None:
        assert set(full) == {128}
        return
    assert all(tokens % GRAIN == 0 for tokens in full)
    if max(full) > GRAIN:
        assert max(waits) <= 1.1 * target
    unused = [target - wait for wait in waits[len(waits) // 2 :]]
    if max(full) < 128:  # no less than it could
        assert min(unused) < 2.5 * GRAIN * (reading + later * 1500)


def test_prompts_are_read_in_whole_chunks_while_nobody_waits() -> None:
    scheduler = Scheduler(2, 2000, 1, 128, 1, True, tpot_target=0.001)
    scheduler.add(long := Continuation([1] * 600, 600))
    counts = []
    while not long.prompt_issued:
        step = scheduler.next()
        assert step is not None
        counts.append(step.batch)
        scheduler.times.note(step, 1.0)
        scheduler.done(step)
    assert counts == [128, 128, 128, 128, 88]

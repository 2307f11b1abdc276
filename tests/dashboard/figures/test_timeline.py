"""Bubbles, shares and windows of timelines, against a count of every microsecond."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.dashboard.figures import timeline
from stageline.dashboard.figures.timeline import Table
from stageline.runtime.bench.records import Timeline
from stageline.runtime.stages.recorder import Span

TICK_S = 1e-3


def recorded(micro_batches: list[tuple[int, list[int]]]) -> Timeline:
    """Micro-batches through stages: for each the pause before it and the ticks that each stage takes."""
    free, spans = [0] * len(micro_batches[0][1]), []
    for number, (pause, taken) in enumerate(micro_batches):
        at = free[0] + pause
        for stage, ticks in enumerate(taken):
            begin = max(at, free[stage])
            at = free[stage] = begin + ticks
            spans.append(Span(stage, "batch", number, begin * TICK_S, at * TICK_S, 2, 7, (number,)))
    return Timeline(tuple(spans))


def timelines() -> st.SearchStrategy[Timeline]:
    """Bursts of micro-batches through one to four stages."""
    pauses = st.one_of(st.just(0), st.integers(0, 30))
    return st.integers(1, 4).flatmap(
        lambda stages: st.lists(
            st.tuples(pauses, st.lists(st.integers(1, 6), min_size=stages, max_size=stages)), min_size=1, max_size=40
        ).map(recorded)
    )


def waits(found: Timeline) -> dict[int, set[int]]:
    """The ticks in which each stage did nothing between two spans of its own while a micro-batch was in progress."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    busy: dict[int, set[int]] = {}
    for span in found.spans:
        begin, end = round(span.began_s / TICK_S), round(span.ended_s / TICK_S)
        first[span.micro_batch] = min(begin, first.get(span.micro_batch, begin))
        last[span.micro_batch] = max(end, last.get(span.micro_batch, end))
        busy.setdefault(span.stage, set()).update(range(begin, end))
    active = {tick for number in first for tick in range(first[number], last[number])}
    return {s: {t for t in range(min(mine), max(mine)) if t not in mine and t in active} for s, mine in busy.items()}


@given(timelines())
@settings(max_examples=60, deadline=None)
def test_bubbles_are_the_times_in_which_a_stage_waits(found: Timeline) -> None:
    bubbles: dict[int, set[int]] = {span.stage: set() for span in found.spans}
    for stage, begin, end in Table.of(found).bubbles:
        bubbles[stage].update(range(round(begin / TICK_S), round(end / TICK_S)))
    assert bubbles == waits(found)


@given(timelines())
@settings(max_examples=20, deadline=None)
def test_shares_of_a_stage_add_up(found: Timeline) -> None:
    for share in timeline.shares(Table.of(found)):
        spans = [span for span in found.spans if span.stage == share.stage]
        assert share.busy_s == pytest.approx(sum(span.ended_s - span.began_s for span in spans))
        assert share.bubble_s == pytest.approx(len(waits(found)[share.stage]) * TICK_S)


def test_what_the_recorder_dropped_is_no_bubble() -> None:
    kept = [Span(0, "decode", n, n * 1.0, n * 1.0 + 0.5, 1, 1, ()) for n in (*range(64), *range(256, 320))]
    found = Table.of(Timeline(tuple(kept)))
    assert all(end - begin < 1 for _, begin, end in found.bubbles)


@given(timelines())
@settings(max_examples=20, deadline=None)
def test_utilisation_of_slices_adds_up_to_the_busy_time(timeline_: Timeline) -> None:
    found = Table.of(timeline_)
    width_s = (found.end_s - found.begin_s) / 160
    for stage in found.stages:
        slices = [
            row["percent"] / 100 * width_s
            for row in timeline.utilisation_rows(found)
            if row["stage"] == f"stage {stage}"
        ]
        mine = found.stage == stage
        assert np.sum(slices) == pytest.approx(float((found.ended_s - found.began_s)[mine].sum()), rel=1e-6)


def test_a_window_holds_what_lies_in_it_and_no_more_than_can_be_drawn() -> None:
    spans = tuple(Span(0, "batch", n, n * TICK_S, (n + 0.5) * TICK_S, 4, 16, tuple(range(12))) for n in range(5000))
    found = Table.of(Timeline(spans))
    rows, more = timeline.span_rows(found, 1.0, 1.0105)
    assert [row["micro_batch"] for row in rows] == list(range(1000, 1011))
    assert not more
    assert rows[0]["shape"] == "4 × 16 tokens"
    assert rows[0]["requests"].endswith("(12)")
    rows, more = timeline.span_rows(found, 0.0, 5.0)
    assert (len(rows), more) == (timeline.MAX_SPANS, True)
    low, high = timeline.first_window(found)
    assert 0 < low < high < 5.0


def steady(numbers: range, at_s: float, batch_s: float = 2e-3) -> list[Span]:
    """Micro-batches of these numbers through one stage, one after the other from `at_s` on."""
    return [
        Span(0, "decode", n, at_s + place * batch_s, at_s + (place + 1) * batch_s, 1, 1, ())
        for place, n in enumerate(numbers)
    ]


def test_the_first_window_lies_within_one_repeat_not_in_the_pause_between_two() -> None:
    found = Table.of(Timeline((*steady(range(100), 0.0), *steady(range(100, 200), 5.0))))
    low, high = timeline.first_window(found)
    assert high - low == pytest.approx(40 * 2e-3)
    assert len(timeline.span_rows(found, low, high)[0]) == 40


def test_the_first_window_shows_micro_batches_between_which_nothing_was_dropped() -> None:
    kept = [span for n in range(0, 64 * 16, 128) for span in steady(range(n, n + 64), n * 2e-3)]
    low, high = timeline.first_window(Table.of(Timeline(tuple(kept))))
    assert high - low == pytest.approx(40 * 2e-3)


def test_a_recording_shorter_than_the_first_window_is_shown_whole() -> None:
    assert timeline.first_window(Table.of(Timeline(tuple(steady(range(3), 1.0))))) == pytest.approx((1.0, 1.006))


@given(timelines(), st.floats(-100, 100), st.floats(-100, 100))
def test_no_window_leaves_the_recording(found: Timeline, low: float, high: float) -> None:
    table = Table.of(found)
    if not table.spans:
        return
    first, last = timeline.bounded(table, min(low, high), max(low, high))
    assert table.begin_s - 1e-9 <= first <= last <= table.end_s + 1e-9
    bubble = timeline.around_longest_bubble(table)
    if bubble is not None:
        longest = float((table.bubbles[:, 2] - table.bubbles[:, 1]).max())
        assert any(
            bubble[0] - 1e-9 <= b and e <= bubble[1] + 1e-9 and e - b == longest for _, b, e in table.bubbles.tolist()
        )

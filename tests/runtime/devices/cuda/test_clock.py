"""Each stage's time on a GPU that several share, against the definition: a sum over all moments."""

from collections import deque
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.devices.cuda.clock import Clock
from stageline.runtime.devices.cuda.driver import CudaError, Driver
from stageline.runtime.devices.cuda.events import Event


class Times:
    """The part of a driver that the clock uses: an event's handle is the time, in milliseconds, when it happens."""

    def __init__(self) -> None:
        self.now = 0

    def done(self, event: int) -> bool:
        return event <= self.now

    def elapsed_s(self, began: int, ended: int) -> float:
        if max(began, ended) > self.now:
            raise CudaError("elapsed_s", "CUDA_ERROR_NOT_READY")
        return float(np.float32(ended - began)) / 1e3

    def event(self, at: int) -> Event:
        return Event(cast(Driver, self), at, 1, deque())


@st.composite
def runs_of_stages(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """For each stage its runs, one after the other, in milliseconds."""
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        at, runs = draw(st.integers(0, 50)), []
        for pause, length in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), max_size=8)):
            runs.append((at + pause, at + pause + length))
            at += pause + length
        stages.append(runs)
    return stages


def shares(stages: list[list[tuple[int, int]]]) -> list[float]:
    """Of each stage, in seconds: each moment counts for all that run in it, in equal parts."""
    bounds = sorted({at for runs in stages for run in runs for at in run})
    found = [0.0] * len(stages)
    for first, last in pairwise(bounds):
        at_work = [n for n, runs in enumerate(stages) if any(b <= first and last <= e for b, e in runs)]
        for number in at_work:
            found[number] += (last - first) / len(at_work) / 1e3
    return found


@given(runs_of_stages(), st.lists(st.integers(0, 700), max_size=10))
def test_the_time_of_several_is_shared(stages: list[list[tuple[int, int]]], looks: list[int]) -> None:
    times, clock = Times(), Clock()
    meters = [clock.new_meter() for _ in stages]
    enqueued = sorted((began, ended, n) for n, runs in enumerate(stages) for began, ended in runs)
    for began, ended, number in enqueued:  # at the latest when it begins
        for look in sorted(looks):
            if times.now < look <= began:
                times.now = look
                clock.count()
        times.now = began
        clock.computed(meters[number], times.event(began), times.event(ended))
    times.now = 10_000
    clock.count()
    assert [meter.busy_s for meter in meters] == pytest.approx(shares(stages), abs=1e-9)


def test_what_is_told_too_late_counts_only_where_nothing_is_counted_yet() -> None:
    times, clock = Times(), Clock()
    early, late = clock.new_meter(), clock.new_meter()
    times.now = 100
    clock.computed(early, times.event(0), times.event(40))
    clock.computed(late, times.event(20), times.event(60))
    assert (early.busy_s, late.busy_s) == pytest.approx((0.04, 0.02))


def test_a_removed_stage_keeps_its_time_and_holds_nobody_up() -> None:
    times, clock = Times(), Clock()
    lost, other = clock.new_meter(), clock.new_meter()
    clock.computed(lost, times.event(0), times.event(1_000_000))
    clock.remove(lost)
    times.now = 50
    clock.computed(other, times.event(10), times.event(50))
    assert (lost.busy_s, other.busy_s) == pytest.approx((0, 0.04))


def test_times_stay_sharp_after_days() -> None:
    times, clock = Times(), Clock()
    meter = clock.new_meter()
    for began in range(0, 7 * 86_400_000, 600_000):  # float32 holds milliseconds for 16,777 seconds
        times.now = began + 3
        clock.computed(meter, times.event(began), times.event(began + 3))
    assert meter.busy_s == pytest.approx(7 * 144 * 0.003)

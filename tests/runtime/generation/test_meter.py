"""Times between tokens are counted one by one, though they come together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.generation.meter import GenerationStats, Meter
from stageline.runtime.times import Tally


def stats_of(meter: Meter) -> GenerationStats:
    return meter.stats((), running=0, waiting=0, cache_usage=0.0, set_back=0)


@given(st.lists(st.lists(st.sampled_from([0.25, 0.5, 1.0]), max_size=5), max_size=5))
def test_tokens_that_come_together_count_each(steps: list[list[float]]) -> None:
    meter, expected = Meter(4), Tally()
    for before in steps:
        meter.later_tokens(2.0, before)
        for at in before:
            expected.add(2.0 - at)
    found = stats_of(meter)
    assert found.times.tpot.counts == expected.histogram().counts
    assert found.times.tpot.total == pytest.approx(expected.histogram().total)
    assert found.tpot_s.count == sum(map(len, steps))

"""Percentiles of Prometheus' histograms: against NumPy's, within a bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.dashboard.figures.metrics import Buckets, percentile
from stageline.runtime.times import BOUNDS_S, Tally

TIMES = st.lists(st.floats(1e-4, 600.0), min_size=100, max_size=300)


def buckets(times: list[float]) -> Buckets:
    counter = Tally()
    for one in times:
        counter.add(one)
    histogram = counter.histogram()
    assert histogram.total == pytest.approx(sum(times))
    return Buckets((*BOUNDS_S, float("inf")), np.cumsum(histogram.counts).astype(float))


@given(TIMES, TIMES, st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(
    earlier: list[float], times: list[float], share: float
) -> None:
    found = percentile(buckets(earlier), buckets(earlier + times), share)
    true = float(np.quantile(times, share, method="inverted_cdf"))
    above = next(bound for bound in BOUNDS_S if bound >= true)
    below = max((bound for bound in BOUNDS_S if bound < true), default=0.0)
    assert found is not None
    assert below <= found <= above


def test_a_restart_and_too_few_times_give_none() -> None:
    assert percentile(buckets([1.0] * 3), buckets([1.0] * 2), 0.5) is None
    assert percentile(buckets([]), buckets([1.0] * 9), 0.9) is None
    assert percentile(None, buckets([1.0]), 0.5) is None


def test_times_beyond_all_bounds_count_as_the_last_bound() -> None:
    assert percentile(buckets([]), buckets([1e6, 1e6]), 0.5) == BOUNDS_S[-1]

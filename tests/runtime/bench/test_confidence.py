"""Confidence intervals against printed tables and against chance."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stageline.runtime.bench.confidence import Ratio, difference, interval, requests_needed, t_quantile, together


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1e6, 1.960)]
)
def test_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_holds_the_truth_19_times_of_20() -> None:
    draws = np.random.default_rng(0).normal(10, 2, (800, 4))
    bounds = [interval(draw.tolist()) for draw in draws]
    assert np.mean([low <= 10 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.025)  # type: ignore[misc]
    assert interval([1.0]) is None
    assert interval([]) is None


def test_a_difference_holds_the_truth_19_times_of_20_however_unlike_the_spreads() -> None:
    draw = np.random.default_rng(1)
    held = []
    for _ in range(800):
        bounds = difference(draw.normal(10, 0.5, 3).tolist(), draw.normal(11, 3, 6).tolist())
        assert bounds is not None
        held.append(bounds[0] <= 1 <= bounds[1])
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)
    assert difference([1.0, 1.0], [2.0]) is None
    assert difference([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0)


def test_a_ratio_holds_the_truth_19_times_of_20_and_never_reaches_zero() -> None:
    draw = np.random.default_rng(2)
    held = []
    for _ in range(800):
        found = Ratio.between(draw.lognormal(2, 0.3, 3).tolist(), draw.lognormal(2 + np.log(0.5), 0.6, 5).tolist())
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert 0 < found.low <= found.value <= found.high
        held.append(found.low <= 0.5 <= found.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)


def test_a_ratio_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs, ours = [9.48, 10.1, 8.9], [68.8, 30.0, 120.0, 51.0]
    found = Ratio.between(theirs, ours)
    assert found is not None
    wanted = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(np.exp([wanted.low, wanted.high])))
    assert found.chance == pytest.approx(stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).pvalue)
    chances = [0.001, 0.04, 0.03, 0.5, 0.9, 0.012]
    assert together(chances) == pytest.approx(stats.false_discovery_control(chances).tolist())


def test_a_ratio_of_single_or_of_no_values() -> None:
    assert Ratio.between([2.0], [1.0, 1.0]) == Ratio(0.5)
    assert Ratio.between([], [1.0]) is None
    assert Ratio.between([0.0, 1.0], [1.0, 1.0]) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=5), st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=5))
def test_the_inverse_ratio_has_the_inverse_interval(one: list[float], other: list[float]) -> None:
    there, back = Ratio.between(one, other), Ratio.between(other, one)
    assert there is not None
    assert back is not None
    assert there.value * back.value == pytest.approx(1)
    if float(there.low or 0) > 1e-290 and float(there.high or 0) < 1e290:
        assert float(there.low or 0) * float(back.high or 0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("figure", "requests"),
    [("latency_p50_s", 1), ("ttft_p90_s", 10), ("tpot_p95_s", 20), ("latency_p99_s", 100), ("requests_per_s", 1)],
)
def test_a_percentile_needs_a_request_beyond_it(figure: str, requests: int) -> None:
    assert requests_needed(figure) == requests

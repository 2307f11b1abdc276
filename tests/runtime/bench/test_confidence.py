"""Confidence intervals against printed tables and against chance."""

import numpy as np
import pytest
from stageline.runtime.bench.confidence import difference, interval, t_quantile


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

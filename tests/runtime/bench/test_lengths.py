"""Distributions of lengths, against their closed formulas."""

import random
from statistics import NormalDist, fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime.bench.lengths import Lengths


def drawn(lengths: Lengths, count: int = 20_000) -> list[int]:
    source = random.Random(0)
    return [lengths.draw(source) for _ in range(count)]


def test_a_range_is_uniform() -> None:
    found = drawn(Lengths.parse("10-20"))
    assert set(found) == set(range(10, 21))
    assert fmean(found) == pytest.approx(15, rel=0.01)
    assert pstdev(found) == pytest.approx((120 / 12) ** 0.5, rel=0.02)


def test_one_length_is_that_length() -> None:
    assert set(drawn(Lengths.parse("64"), 100)) == {64}


def test_a_wide_normal_has_its_mean_and_deviation() -> None:
    found = drawn(Lengths.parse("normal:200,20,1-1000"))
    assert fmean(found) == pytest.approx(200, abs=0.6)
    assert pstdev(found) == pytest.approx(20, rel=0.02)


def test_a_bounded_normal_has_the_mean_of_the_truncated_one() -> None:
    found = drawn(Lengths.parse("normal:100,40,90-200"))
    unit = NormalDist()
    low, high = (90 - 100) / 40, (200 - 100) / 40
    expected = 100 + 40 * (unit.pdf(low) - unit.pdf(high)) / (unit.cdf(high) - unit.cdf(low))
    assert min(found) >= 90
    assert max(found) <= 200
    assert fmean(found) == pytest.approx(expected, rel=0.01)


@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(0, 1), st.floats(0.01, 1e6), st.integers(0, 99))
def test_what_is_drawn_lies_within_the_bounds(low: int, width: int, place: float, stdev: float, seed: int) -> None:
    lengths = Lengths(low, low + width, low + place * width, stdev)
    assert low <= lengths.draw(random.Random(seed)) <= low + width


@pytest.mark.parametrize(
    "text", ["", "0", "8-2", "-4", "2.5", "normal:64,20", "normal:64,0,1-99", "normal:5,2,10-20", "normal:64,20,16"]
)
def test_no_length_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a length; give tokens like 64, a range like 16-128, or mean"):
        Lengths.parse(text)

"""Arrivals against closed formulas, and traces: what is read, and what is refused in one line."""

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime.bench.arrivals import arrive, pattern, read_trace


def gaps(shape: str, seed: int = 0) -> np.ndarray:
    return np.diff(arrive(shape, 50.0, 400.0, seed), prepend=0.0)


@pytest.mark.parametrize(
    ("shape", "variation"), [("poisson", 1.0), ("gamma:1", 1.0), ("gamma:0.25", 2.0), ("gamma:4", 0.5)]
)
def test_random_gaps_have_the_mean_and_the_variation_of_theory(shape: str, variation: float) -> None:
    found = gaps(shape)
    assert len(found) == 20_000
    assert found.mean() == pytest.approx(1 / 50, rel=4 * variation / math.sqrt(len(found)))
    assert found.std() / found.mean() == pytest.approx(variation, rel=0.06)


def test_a_constant_rate_is_evenly_spaced_from_zero() -> None:
    assert arrive("constant", 4.0, 2.0, 0) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_bursts_come_at_once_and_keep_the_rate() -> None:
    assert arrive("bursts:4", 2.0, 5.0, 0) == [0.0] * 4 + [2.0] * 4 + [4.0] * 2


def test_a_ramp_has_half_the_arrivals_and_their_number_grows_with_the_square() -> None:
    found = np.array(arrive("ramp", 100.0, 100.0, 0))
    assert len(found) == 5000
    for share in (0.25, 0.5, 0.75):  # the integral of a rate that rises from 0 to 100/s in 100 s
        expected = 5000 * share**2
        assert (found < 100 * share).sum() == pytest.approx(expected, abs=4 * math.sqrt(expected))


@given(
    st.sampled_from(["poisson", "constant", "gamma:0.5", "gamma:3", "bursts:3", "ramp"]),
    st.floats(0.01, 1000),
    st.floats(0.1, 10),
    st.integers(0, 99),
)
def test_arrivals_ascend_and_another_rate_stretches_the_same_pattern(
    shape: str, rate: float, seconds: float, seed: int
) -> None:
    times = arrive(shape, rate, seconds, seed)
    assert times == sorted(times)
    assert times[0] >= 0
    assert len(times) == max(1, math.ceil(rate * seconds / (2 if shape == "ramp" else 1)))
    slower = arrive(shape, rate / 2, 2 * seconds, seed)
    assert np.array(slower[: len(times)]) == pytest.approx(2 * np.array(times[: len(slower)]))


@pytest.mark.parametrize(
    ("text", "expected"), [("poisson", "poisson"), (" gamma:0.50 ", "gamma:0.5"), ("bursts:08", "bursts:8")]
)
def test_a_pattern_has_one_form(text: str, expected: str) -> None:
    assert pattern(text) == expected


@pytest.mark.parametrize("text", ["", "weekly", "gamma", "gamma:0", "gamma:-1", "bursts:0", "bursts:1.5", "ramp:3"])
def test_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a pattern of arrivals; give one of poisson, constant, gamma:B"):
        pattern(text)


def trace_of(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "trace"
    file.write_text(text, encoding="utf-8")
    return file


def test_times_are_sorted_and_begin_at_zero(tmp_path: Path) -> None:
    found = read_trace(trace_of(tmp_path, "10.0\n\n10.2\n 1.01e1 \n"), 2.0)
    assert found.times_s == pytest.approx((0.0, 0.2, 0.4))
    assert found.lengths == ()


def test_lengths_stay_with_their_times(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": i, "output_length": 9, "hash_ids": [1]} for t, i in ((3000, 5), (1000, 7))]
    found = read_trace(trace_of(tmp_path, "\n".join(map(json.dumps, rows))), 0.001)
    assert found.times_s == pytest.approx((0.0, 2.0))
    assert found.lengths == ((7, 9), (5, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\nx\n", "line 2: 'x' is neither a time in seconds nor a JSON object"),
        ("[1]", "line 1: '[1]' is neither"),
        ("nan", "line 1: the time is 'nan'; give a number of seconds"),
        ("1\n-inf", "line 2: the time is '-inf'"),
        ('{"timestamp": 1, "input_length": 2}', "line 1 has no output_length; give timestamp, input_length and"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 2}', "line 1: input_length is 0; give a whole number"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 2.5}', "line 1: output_length is 2.5; give a whole"),
        ('{"timestamp": true, "input_length": 1, "output_length": 2}', "line 1: the time is 'True'"),
        ('1\n{"timestamp": 1, "input_length": 1, "output_length": 2}', "has lengths in some lines only"),
        ("\n \n", "holds no times"),
        ("[" * 9999, "line 1: '[[[["),
        ("{" + '"a":{' * 9999, "is neither a time"),
    ],
)
def test_a_wrong_trace_is_refused_by_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_trace(trace_of(tmp_path, text), 1.0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_trace_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any-trace"
    file.write_text(text, encoding="utf-8", errors="replace")
    with suppress(RequestError):
        found = read_trace(file, 1.0)
        assert found.times_s[0] == 0.0
        assert list(found.times_s) == sorted(found.times_s)


def test_a_time_scale_is_above_zero(tmp_path: Path) -> None:
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RequestError, match="is not above 0; give a factor"):
            read_trace(trace_of(tmp_path, "1"), scale)

"""Drawing on a device gives what drawing on the host gives, with the same uniform numbers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.engines.lowering import draw_graph
from stageline.runtime.engines.lowering.draw_graph import DONE, INCOMPLETE, NOT_FINITE
from stageline.runtime.generation.request import Sampling
from stageline.runtime.generation.sampling import Row
from stageline.runtime.generation.settings import decide

ROWS = 6


@cache
def session(vocabulary: int, greedy: bool = False) -> Any:
    graph = (draw_graph.greedy_graph if greedy else draw_graph.draw_graph)(vocabulary)
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def drawn(logits: np.ndarray, rows: list[Row]) -> np.ndarray:
    """int64 [rows, 2], from logits [rows, vocabulary]."""
    values = np.array([row.device_settings(0) for row in rows], np.float32)
    token, result = session(logits.shape[1]).run(None, {"logits": logits[:, None], "settings": values})
    assert (token == result[:, :1]).all()
    return np.asarray(result)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), vocabulary=st.sampled_from([5, 99, 256, 1733, 49152]))
def test_tokens_are_those_of_the_host(data: st.DataObject, seed: int, vocabulary: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((ROWS, vocabulary)).astype(np.float32) * data.draw(
        st.sampled_from([0.0, 1.0, 3.0, 9.0])
    )
    if data.draw(st.booleans()):
        logits = logits.astype(ml_dtypes.bfloat16).astype(np.float32)  # with many that are equal
    kinds = st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 2, 17, 128]),
        top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.02, 0.4]),
        seed=st.integers(0, 999),
    )
    asked = [decide(data.draw(kinds), GenerationDefaults(), 1) for _ in range(ROWS)]
    rows, twins = ([Row(one, vocabulary) for one in asked] for _ in range(2))
    result = drawn(logits, rows)
    for place, twin in enumerate(twins):
        token, status = result[place].tolist()
        assert status in (DONE, INCOMPLETE)
        if status == DONE:
            assert token == twin.choose(logits[place]), asked[place]


def test_what_the_candidates_do_not_hold_is_left_to_the_host() -> None:
    vocabulary = 49152
    logits = np.random.default_rng(1).standard_normal((3, vocabulary)).astype(np.float32)
    asked = [Sampling(temperature=1, top_p=0.99), Sampling(temperature=1, min_p=1e-4), Sampling(temperature=1, top_k=5)]
    rows = [Row(decide(one, GenerationDefaults(), 1), vocabulary) for one in asked]
    assert drawn(logits, rows)[:, 1].tolist() == [INCOMPLETE, INCOMPLETE, DONE]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("greedy", [False, True])
def test_rows_that_are_no_numbers_are_reported(value: float, greedy: bool) -> None:
    logits = np.random.default_rng(2).standard_normal((3, 99)).astype(np.float32)
    logits[1, 40] = value
    given = {"logits": logits[:, None]}
    if not greedy:
        row = Row(decide(Sampling(temperature=1, seed=3), GenerationDefaults(), 1), 99)
        given["settings"] = np.array([row.device_settings(0)] * 3, np.float32)
    token, result = session(99, greedy).run(None, given)
    assert result[:, 1].tolist() == [DONE, DONE if value == -np.inf else NOT_FINITE, DONE]
    if greedy:
        assert token[[0, 2], 0].tolist() == logits[[0, 2]].argmax(axis=1).tolist()


def test_of_equally_likely_tokens_greedy_rows_take_the_first() -> None:
    logits = np.zeros((2, 99), np.float32)
    logits[1, [7, 60, 12]] = 4
    assert session(99, True).run(None, {"logits": logits[:, None]})[0].tolist() == [[0], [7]]


@pytest.mark.parametrize(
    "change",
    [{"logprobs": 1}, {"repetition_penalty": 1.2}, {"min_tokens": 4}, {"top_k": 1000}, {"suppress_tokens": (5,)}],
)
def test_what_only_the_host_can_do_is_not_given_to_the_device(change: dict[str, Any]) -> None:
    asked = decide(Sampling(temperature=1, **change), GenerationDefaults(), 1)
    assert Row(asked, 99, end_ids=[2]).device_settings(0) is None


def test_numbers_asked_for_ahead_are_those_of_the_tokens_in_their_order() -> None:
    make: Callable[[], Row] = lambda: Row(decide(Sampling(temperature=1, seed=5), GenerationDefaults(), 1), 99)  # noqa: E731
    row, twin = make(), make()
    ahead = [row.device_settings(place)[4] for place in (1, 0)]  # type: ignore[index]
    assert ahead == [twin.device_settings(place)[4] for place in (1, 0)]  # type: ignore[index]
    row.record_drawn(3)
    assert row.device_settings(0)[4] == ahead[0]  # type: ignore[index]

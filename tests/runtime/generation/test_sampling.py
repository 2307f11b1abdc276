"""Tokens are chosen as transformers' processors would leave them, and each row for itself."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stageline.models.errors import EngineError
from stageline.runtime.generation.sampling import Drawn, Row, sample, weigh
from stageline.runtime.generation.settings import Settings
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 500

samplings = st.builds(
    Settings,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, VOCABULARY]),
    top_p=st.sampled_from([0.0, 0.4, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 4]),
)


def random_logits(seed: int, rows: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, VOCABULARY)) * 3).astype(np.float32)


def tokens(results: Sequence[Drawn | EngineError]) -> list[int]:
    for result in results:
        assert isinstance(result, Drawn), result
    return [result.token_id for result in results if isinstance(result, Drawn)]


def draws(logits: NDArray[np.float32], row: Row, count: int) -> list[int]:
    """`count` tokens, each from the same logits [1, vocabulary]."""
    return [tokens(sample(logits, [row]))[0] for _ in range(count)]


def transformers_probabilities(scores: NDArray[np.float32], sampling: Settings) -> NDArray[np.float64]:
    """What transformers' warpers leave, float64 throughout."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    warped = torch.from_numpy(scores).double()[None]
    for warper in warpers:
        warped = warper(None, warped)
    probabilities: NDArray[np.float64] = warped.softmax(dim=-1)[0].numpy()
    return probabilities


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, VOCABULARY + 100),
    top_p=st.one_of(st.just(1.0), st.floats(0, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1)),
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    (scores,) = random_logits(seed)
    expected = transformers_probabilities(scores, sampling)
    ids, weights = weigh(scores, sampling)
    assert ids[weights > 0].tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(weights / weights.sum(), expected[ids], rtol=1e-9)


def test_ties_with_the_kth_token_stay() -> None:
    scores = np.array([1, 3, 2, 2, 2, 0], np.float32)
    ids, _ = weigh(scores, Settings(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(transformers_probabilities(scores, Settings(temperature=1.0, top_k=2))).tolist() == [
        1,
        2,
        3,
        4,
    ]


def test_of_equally_likely_tokens_at_the_edge_of_top_p_the_lowest_ids_stay() -> None:
    ids, weights = weigh(np.zeros(8, np.float32), Settings(temperature=1.0, top_p=0.5))
    assert ids.tolist() == [0, 1, 2, 3]
    assert weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("feature", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 5e-324}])
def test_the_tightest_settings_leave_the_likeliest(feature: dict[str, Any]) -> None:
    logits = random_logits(3)
    row = Row(Settings(**{"temperature": 1.0, **feature}), VOCABULARY)
    assert draws(logits, row, 20) == [int(logits.argmax())] * 20


def test_tokens_come_as_often_as_they_are_probable() -> None:
    logits = random_logits(1)[:, :12]
    sampling = Settings(temperature=1.3, top_p=0.97, seed=7)
    expected = transformers_probabilities(logits[0], sampling)
    count = 20_000
    seen = np.bincount(draws(logits, Row(sampling, 12), count), minlength=12)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    chi_square = float(((seen - count * expected)[possible] ** 2 / (count * expected[possible])).sum())
    freedom = int(possible.sum()) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # its mean and standard deviations


@settings(deadline=None)
@given(st.lists(samplings, min_size=2, max_size=6), st.randoms(use_true_random=False), st.integers(0, 10**6))
def test_a_row_draws_the_same_whatever_is_beside_it(asked: list[Settings], order: Any, seed: int) -> None:
    def rows() -> list[Row]:
        return [Row(sampling, VOCABULARY, range(20), [5], choice=i) for i, sampling in enumerate(asked)]

    together, alone = rows(), rows()
    for step in range(5):
        logits = random_logits(seed + step, len(asked))
        places = list(range(len(asked)))
        order.shuffle(places)
        shuffled = sample(logits[places], [together[place] for place in places])
        for place, result in zip(places, shuffled, strict=True):
            assert sample(logits[place : place + 1], [alone[place]]) == [result]


def test_the_same_seed_draws_the_same_and_other_choices_draw_on_their_own() -> None:
    logits = random_logits(0)
    sampling = Settings(temperature=1.0, seed=11)
    first = draws(logits, Row(sampling, VOCABULARY), 30)
    assert draws(logits, Row(sampling, VOCABULARY), 30) == first
    assert draws(logits, Row(sampling, VOCABULARY, choice=1), 30) != first
    assert draws(logits, Row(Settings(temperature=1.0, seed=12), VOCABULARY), 30) == draws(
        logits, Row(sampling, VOCABULARY, choice=1), 30
    )


def test_without_a_seed_no_two_rows_draw_the_same() -> None:
    logits = random_logits(0)
    sampling = Settings(temperature=1.0)
    assert draws(logits, Row(sampling, VOCABULARY), 30) != draws(logits, Row(sampling, VOCABULARY), 30)


def test_rounding_differences_in_the_logits_do_not_change_the_tokens() -> None:
    sampling = Settings(temperature=1.0, seed=5)
    exact, noisy = Row(sampling, VOCABULARY), Row(sampling, VOCABULARY)
    generator = np.random.default_rng(0)
    for step in range(1000):
        logits = random_logits(step)
        noise = generator.uniform(-1e-6, 1e-6, logits.shape).astype(np.float32)
        assert sample(logits, [exact]) == sample(logits + noise, [noisy])


def test_the_logits_are_only_read() -> None:
    logits = random_logits(0, 3)
    logits.flags.writeable = False
    features: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 2.0, "min_tokens": 1, "logprobs": 3},
    ]
    sample(logits, [Row(Settings(**feature), VOCABULARY, [1, 2], [0]) for feature in features])


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([[0, 2, 1, 2], [3, 0, 0, 3]], np.float32)
    assert tokens(sample(logits, [Row(Settings(), 4), Row(Settings(), 4)])) == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("feature", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 2.0, "logprobs": 2}])
def test_a_row_with_broken_logits_gets_an_error_and_the_others_go_on(bad: float, feature: dict[str, Any]) -> None:
    logits = random_logits(2, 3)
    logits[1, 77] = bad
    sampling = Settings(**feature)
    rows = [Row(sampling, VOCABULARY) for _ in range(3)]
    results = sample(logits, rows)
    assert isinstance(results[1], EngineError)
    assert str(results[1]).startswith(f"the largest logit of token 0 is {bad}: numbers overflowed")
    assert rows[1].drawn == 0
    assert [results[0]] == sample(logits[:1], [Row(sampling, VOCABULARY)])
    assert [results[2]] == sample(logits[2:], [Row(sampling, VOCABULARY)])


def test_a_row_of_minus_infinity_gets_an_error() -> None:
    (result,) = sample(np.full((1, 9), -np.inf, np.float32), [Row(Settings(temperature=1.0), 9)])
    assert isinstance(result, EngineError)
    assert "the largest logit of token 0 is -inf" in str(result)


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full((1, 64), -np.inf, np.float32)
    logits[0, [3, 40]] = 1.0
    for top_k in (0, 10):
        row = Row(Settings(temperature=1.0, seed=0, top_k=top_k), 64)
        assert set(draws(logits, row, 200)) == {3, 40}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_and_stop_tokens_are_not_drawn_before_min_tokens(temperature: float) -> None:
    logits = np.zeros((1, 10), np.float32)
    logits[0, 4], logits[0, 6] = 60, 50
    sampling = Settings(temperature=temperature, seed=0, min_tokens=3, stop_token_ids=(6, 10_000))
    drawn = draws(logits, Row(sampling, 10, end_ids=[4]), 5)
    assert not {4, 6} & set(drawn[:3])
    assert drawn[3:] == [4, 4]


def test_min_tokens_that_leave_no_token_is_an_error_of_that_row() -> None:
    logits = np.array([[5, -np.inf], [5, 0]], np.float32)
    rows = [Row(Settings(min_tokens=2), 2, end_ids=[0]) for _ in range(2)]
    error, drawn = sample(logits, rows)
    assert isinstance(error, EngineError)
    assert "no token is left for token 0" in str(error)
    assert drawn == Drawn(1)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4)
    expected = torch.from_numpy(logits[0]).double().log_softmax(dim=0)
    row = Row(Settings(temperature=2.0, seed=3, repetition_penalty=5.0, top_k=50, logprobs=6), VOCABULARY, range(400))
    for _ in range(5):
        (drawn,) = sample(logits, [row])
        assert isinstance(drawn, Drawn)
        assert drawn.logprob is not None
        assert drawn.logprob.token_id == drawn.token_id
        assert drawn.logprob.logprob == pytest.approx(float(expected[drawn.token_id]), abs=1e-12)
        best = expected.topk(6)
        assert [token for token, _ in drawn.logprob.top] == best.indices.tolist()
        assert [value for _, value in drawn.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-12)


def test_top_logprobs_name_the_lowest_ids_of_equally_likely_tokens() -> None:
    logits = np.array([[1, 2, 1, 1, 2]], np.float32)
    (drawn,) = sample(logits, [Row(Settings(logprobs=3), 5)])
    assert isinstance(drawn, Drawn)
    assert drawn.logprob is not None
    assert [token for token, _ in drawn.logprob.top] == [1, 4, 0]


def test_logprobs_of_zero_name_no_others_and_more_than_the_vocabulary_names_all() -> None:
    logits = np.array([[1, 2, 0]], np.float32)
    none, every = sample(np.repeat(logits, 2, axis=0), [Row(Settings(logprobs=0), 3), Row(Settings(logprobs=20), 3)])
    assert isinstance(none, Drawn)
    assert isinstance(every, Drawn)
    assert none.logprob is not None
    assert none.logprob.top == ()
    assert every.logprob is not None
    assert sum(math.exp(value) for _, value in every.logprob.top) == pytest.approx(1)


@settings(deadline=None)
@given(
    st.integers(1, 6000), st.integers(1, 40), st.sampled_from([3, 1000]), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_the_tokens_that_top_k_leaves_are_those_of_a_sort(
    vocabulary: int, top_k: int, levels: int, seed: int, barred: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, vocabulary).astype(np.float32)  # ties, with few levels
    if barred:
        scores[rng.random(vocabulary) < 0.999] = -np.inf
        scores[0] = 0  # something is left
    ids, _ = weigh(scores, Settings(temperature=1.0, top_k=top_k))
    edge = np.sort(scores)[-top_k] if top_k < vocabulary else -np.inf
    np.testing.assert_array_equal(ids, np.flatnonzero(scores >= edge))

"""Errors are fractions of the reference's own values, and rows that depend on the batch are computed alone."""

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.verify.rows_alone import rows_alone
from stageline.exporter.verify.scale import token_errors, typical


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0, 1e4])
def test_an_error_is_as_large_whatever_the_size_of_the_values(size: float) -> None:
    want = np.random.default_rng(0).standard_normal((3, 7, 5)) * size
    largest = np.abs(want).max(axis=-1)
    expected = 0.1 * largest / np.maximum(largest, np.median(largest))
    got = want.copy()
    got[..., 2] += 0.1 * largest
    np.testing.assert_allclose(token_errors(got, want), expected, rtol=1e-9)


def test_outputs_that_are_zero_differ_by_nothing_or_much() -> None:
    zero = np.zeros((4, 3))
    assert token_errors(zero, zero).max() == 0
    assert token_errors(zero + 1e-12, zero).max() < 1e-4
    assert token_errors(zero + 1e-3, zero).min() > 1


def test_a_logit_near_zero_by_chance_is_judged_as_the_others_are() -> None:
    want = np.array([[3.0], [1e-9], [-2.0]])
    assert token_errors(want + 1e-6, want).max() < 1e-6
    assert token_errors(np.array([[2e-6]]), np.array([[1e-6]]), typical(want)).max() < 1e-6


def test_what_is_not_finite_must_be_the_same() -> None:
    want = np.array([[1.0, -np.inf, 2.0], [np.nan, 1.0, np.finfo(np.float32).min]])
    assert token_errors(want, want).max() == 0
    masked_in_bfloat16 = np.array([[1.0, -np.inf, 2.0], [np.nan, 1.0, -3.3895e38]])
    assert token_errors(masked_in_bfloat16, want).max() == 0
    assert np.isinf(token_errors(np.where(np.isfinite(want), want, 0), want)).all()
    assert np.isinf(token_errors(np.full((1, 2), np.nan), np.ones((1, 2)))).all()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [5.0] * 4,
         "factor": 4.0, "original_max_position_embeddings": 8},
    ],
)  # fmt: skip
def test_rows_do_not_depend_on_longer_rows_beside_or_before_them(rope: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        num_hidden_layers=1, max_position_embeddings=8, initializer_range=0.5, rope_parameters=rope,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(1, 20, (4, 24))
    lengths = np.array([24, 5, 12, 8])
    mask = (np.arange(24) < lengths[:, None]).astype(np.int64)

    def logits(model: torch.nn.Module, given: np.ndarray, real: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            values: np.ndarray = model(torch.from_numpy(given), attention_mask=torch.from_numpy(real)).logits.numpy()
        return values

    model = transformers.LlamaForCausalLM(config).eval()
    weights = model.state_dict()
    got = rows_alone(
        model, lambda given: {"logits": logits(model, given["input_ids"], given["attention_mask"])},
        {"input_ids": ids, "attention_mask": mask},
    )["logits"]  # fmt: skip
    together = logits(model, ids, mask)
    assert np.abs(together[1, :5] - got[1, :5]).max() > 1e-2  # what transformers makes of a batch
    for row, length in enumerate(lengths):
        fresh = transformers.LlamaForCausalLM(config).eval()
        fresh.load_state_dict(weights)
        want = logits(fresh, ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        np.testing.assert_allclose(got[row, :length], want, atol=1e-5)
        assert not got[row, length:].any()

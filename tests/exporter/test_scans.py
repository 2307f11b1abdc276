"""Recurrences that hold for rows of any length, against transformers' loops over tokens and chunks."""

import pytest
import torch
from stageline.exporter import scans
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

LENGTHS = (1, 7, 31, 32, 33, 64, 700, 2100)  # 2100: chunks of chunks


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) <= 5e-6


@pytest.mark.parametrize("length", LENGTHS)
def test_a_linear_scan_is_the_loop(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    decay, added = (torch.rand(2, 3, length, 4, generator=generator) for _ in range(2))
    state, states = torch.zeros(2, 3, 4), []
    for t in range(length):
        state = decay[:, :, t] * state + added[:, :, t]
        states.append(state)
    _close(scans.linear_scan(decay, added), torch.stack(states, 2))


@pytest.mark.parametrize("length", [1, 7, 41, 130])
def test_scans_are_those_of_transformers(length: int) -> None:
    torch.manual_seed(length)
    rows, steps, decay = torch.randn(2, 12, length), torch.randn(2, 12, length), -torch.rand(12, 8)
    read, written = torch.randn(2, 8, length), torch.randn(2, 8, length)
    options = {"D": torch.randn(12), "z": torch.randn(2, 12, length), "delta_bias": torch.randn(12)}
    original = modeling_mamba.mamba_selective_scan
    given = (rows, steps, decay, read, written)
    _close(
        scans._selective_scan(original)(*given, **options, delta_softplus=True),
        original(*given, **options, delta_softplus=True),
    )

    given = (torch.randn(2, length, 4, 8), torch.randn(2, length, 4), -torch.rand(4))
    groups = (torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8))
    bias = {"D": torch.randn(4), "dt_bias": torch.randn(4), "dt_softplus": True}
    original = modeling_mamba2.mamba2_chunk_scan
    _close(scans._whole_chunks(original)(*given, *groups, 16, **bias), original(*given, *groups, 16, **bias))


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_the_delta_rule_is_that_of_transformers_also_where_keys_repeat(length: int) -> None:
    torch.manual_seed(length)
    key = torch.randn(2, length, 2, 8)
    key[:, 3:60] = key[:, :1]  # then the triangle of a chunk is nearly singular
    given = (torch.randn(2, length, 2, 8), key, torch.randn(2, length, 4, 6))
    given += (-0.3 * torch.rand(2, length, 4), torch.rand(2, length, 4))
    original = modeling_qwen3_next.torch_chunk_gated_delta_rule
    want, _ = original(*given, use_qk_l2norm_in_kernel=True)
    _close(scans._chunked_delta_rule(original)(*given, use_qk_l2norm_in_kernel=True)[0], want)

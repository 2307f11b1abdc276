"""State spaces and delta rules that hold for rows of any length, against transformers' loops over tokens and chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter import scans
from stageline.exporter.export import export
from stageline.exporter.scan_graph import LONGEST
from stageline.runtime import Pipeline
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

_LENGTHS = pytest.mark.parametrize("length", [1, 2, 31, 32, 41, 130, 500])


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is one operator of a trace is computed by a loop, to which test_scan_graph.py holds the operator's graph."""

    def loop(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        compose = torch.mul if added.dim() == 4 else torch.matmul
        states = [added[:, :, 0]]
        for t in range(1, added.shape[2]):
            states.append(compose(decay[:, :, t], states[-1]) + added[:, :, t])
        return torch.stack(states, 2)

    monkeypatch.setattr(scans, "scan", loop)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) <= 5e-6


@pytest.mark.usefixtures("computed")
@_LENGTHS
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


@pytest.mark.usefixtures("computed")
@_LENGTHS
def test_the_delta_rule_is_that_of_transformers_also_where_keys_repeat(length: int) -> None:
    torch.manual_seed(length)
    key = torch.randn(2, length, 2, 8)
    key[:, 3:60] = key[:, :1]  # then the triangle of a chunk is nearly singular
    given = (torch.randn(2, length, 2, 8), key, torch.randn(2, length, 4, 6))
    given += (-0.3 * torch.rand(2, length, 4), torch.rand(2, length, 4))
    original = modeling_qwen3_next.torch_chunk_gated_delta_rule
    want, _ = original(*given, use_qk_l2norm_in_kernel=True)
    _close(scans._chunked_delta_rule(original)(*given, use_qk_l2norm_in_kernel=True)[0], want)


def test_a_mamba_in_bfloat16_takes_rows_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, state_size=8, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mamba")
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "mamba", dtype=torch.float32).eval()
    bundle = export(tmp_path / "mamba", tmp_path / "bundle")
    assert bundle.manifest.max_positions == LONGEST
    with Pipeline.open(tmp_path / "bundle") as pipeline:
        for length in (1, 2, 31, 32, 41, 100, 500):
            ids = np.random.default_rng(length).integers(0, 99, (2, length))
            with torch.no_grad():
                want = model(torch.tensor(ids)).logits.numpy()
            got = pipeline.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), length

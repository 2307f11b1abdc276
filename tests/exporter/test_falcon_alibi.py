"""Falcon's ALiBi is rounded as transformers rounds it, in float32 arithmetic that every engine keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.exporter.falcon_alibi import rounded, rounded_alibi
from stageline.exporter.synthesize import synthesize
from transformers.models.falcon import modeling_falcon

FALCON: dict[str, Any] = {
    "model_type": "falcon", "architectures": ["FalconForCausalLM"], "alibi": True, "num_attention_heads": 6,
    "new_decoder_architecture": False, "multi_query": False, "hidden_size": 48, "num_hidden_layers": 1,
    "vocab_size": 30, "initializer_range": 0.3,
}  # fmt: skip


def test_values_are_rounded_as_bfloat16_rounds_them() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.arange(70_000.0), torch.randn(10_000) * torch.logspace(-20, 20, 10_000)])
    assert torch.equal(rounded(values), values.bfloat16().float())


@pytest.mark.parametrize("heads", [6, 8])
def test_biases_are_those_of_transformers(heads: int) -> None:
    mask = torch.ones(2, 700, dtype=torch.int64)
    mask[1, 600:] = 0
    want = modeling_falcon.build_alibi_tensor(mask, heads, torch.float32)
    config = transformers.FalconConfig(**{**FALCON, "hidden_size": 8 * heads, "num_attention_heads": heads})
    with rounded_alibi(transformers.FalconModel(config)):
        assert torch.equal(modeling_falcon.build_alibi_tensor(mask, heads, torch.float32), want)
    exact = modeling_falcon.build_alibi_tensor(mask[:1, :2], heads, torch.float32)[:, :, 1:] * torch.arange(700)
    assert not torch.equal(want[:heads], exact), "they are rounded"


def test_a_falcon_with_alibi_is_right_on_long_rows(tmp_path: Path) -> None:
    synthesize(FALCON, tmp_path / "c", seed=2, dtype="bfloat16")
    checked = str(export(tmp_path / "c", tmp_path / "b").manifest.checked)
    assert checked.startswith("ran rows of 1, 5 and 521 tokens; largest difference to transformers ")
    assert float(checked.split()[-4]) < 1e-4

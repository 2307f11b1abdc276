"""verify references a .gguf by what the file says: an export that dropped something is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter import export as module
from stageline.exporter.export import export
from stageline.exporter.gguf import rotary
from stageline.exporter.verify.against_torch import verify
from stageline.exporter.verify.gguf_reference import load_gguf_reference
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.runtime import Pipeline

pytest.importorskip("gguf", reason="needs gguf")
import gguf
from tiny_gguf import VOCABULARY, write_gguf

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama3() -> Any:
    """A tiny Llama 3: its converter writes what it does to the rotary positions as rope_freqs.weight."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        num_hidden_layers=2, max_position_embeddings=512, initializer_range=0.25, rope_parameters=LLAMA3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().bfloat16().float()  # what bfloat16 holds


@pytest.fixture(scope="module")
def split(llama3: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bfloat16, in two parts; the second has the last block."""
    folder = tmp_path_factory.mktemp("split")
    factors = 1e4 ** (-np.arange(8) / 8) / llama3.model.rotary_emb.inv_freq.numpy()
    parts = [folder / f"m-{number}-of-00002.gguf" for number in ("00001", "00002")]
    last = [f"blk.1.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                                                "ffn_down", "attn_norm", "ffn_norm")]  # fmt: skip
    others = ["rope_freqs.weight", "token_embd.weight", "output_norm.weight", "output.weight",
              *(name.replace("blk.1", "blk.0") for name in last)]  # fmt: skip
    for number, left_out in enumerate((last, others)):
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": len(last) + len(others)}
        write_gguf(parts[number], llama3, "llama", keys, extra={"rope_freqs.weight": factors},
                   kind=gguf.GGMLQuantizationType.BF16, leave_out=left_out)  # fmt: skip
    return parts[0]


def test_a_split_bfloat16_file_is_exported_as_what_it_says(llama3: Any, split: Path, tmp_path: Path) -> None:
    assert export(split, tmp_path / "b").manifest.dtype == "bfloat16"
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, 120))
    with torch.no_grad():
        want = llama3(torch.from_numpy(ids)).logits.numpy()
    with Pipeline.open(tmp_path / "b") as pipeline:
        got = pipeline.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].astype(np.float32)
    np.testing.assert_allclose(got, want, atol=6e-2 * np.abs(want).max())
    assert verify(tmp_path / "b", split, seed=1).passed


def test_verify_finds_that_an_export_dropped_the_scaling(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "_scaling", lambda metadata, tensors, context: {})
    with pytest.raises(ExportError, match="for rows of 5 and 1 tokens, logits differs from transformers'"):
        export(split, tmp_path / "b")
    monkeypatch.setattr(module, "run_at_export", lambda bundle, wanted: "nothing ran")
    export(split, tmp_path / "b")
    done = verify(tmp_path / "b", split, seed=1)
    assert not done.passed
    assert max(comparison.relative_error for comparison in done.comparisons) > 0.3


@pytest.mark.parametrize(
    ("heads", "rows", "keys"),
    [
        (4, VOCABULARY, {"attention.head_count_kv": None}),  # Llama 2 7B
        (2, VOCABULARY, {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}),
        (2, VOCABULARY + 5, {}),  # more rows than tokens
    ],
)
def test_the_reference_is_what_the_file_says(tmp_path: Path, heads: int, rows: int, keys: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=64, num_attention_heads=4, num_key_value_heads=heads, intermediate_size=96,
        num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.25,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    file = write_gguf(tmp_path / "m.gguf", model, "llama", keys, kind=gguf.GGMLQuantizationType.BF16)
    reference = load_gguf_reference(Checkpoint.open(file), transformers.AutoModelForCausalLM, "eager").eval()
    ids = torch.randint(VOCABULARY, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, model(ids).logits, atol=1e-4, rtol=0)

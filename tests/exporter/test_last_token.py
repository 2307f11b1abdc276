"""Decoders that classify, without a padding token: each row by its own last token, as transformers does row by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.exporter.last_token import find_by_mask, lacks_padding
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.against_torch import verify
from stageline.runtime import Pipeline

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
LLAMA = {
    **SIZES, "model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "intermediate_size": 48,
    "num_labels": 3, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}  # fmt: skip
LENGTHS = (9, 1, 4)


def rows() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ragged rows whose padding is the token 0, and which hold that token themselves."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(3, 60, mask.shape) * mask
    ids[0, -1] = 0
    return ids, mask


def one_by_one(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        one = [model(torch.from_numpy(row[None, :n])).logits[0] for row, n in zip(ids, LENGTHS, strict=True)]
    return torch.stack(one).numpy()


@pytest.mark.parametrize("padding", [None, -1])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "opt"])
def test_rows_of_a_batch_are_read_to_their_last_token(kind: str, padding: int | None) -> None:
    config = transformers.AutoConfig.for_model(kind, **SIZES, num_labels=3, **SHAPES.get(kind, {}))
    config.pad_token_id = None
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.config.pad_token_id = padding
    ids, mask = rows()
    want = one_by_one(model, ids)
    assert lacks_padding(model)
    find_by_mask(model)
    with torch.no_grad():
        got = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_models_that_know_padding_or_need_none_stay_as_they_are() -> None:
    for kind, padding in (("llama", 0), ("llama", 59)):
        config = transformers.AutoConfig.for_model(kind, **SIZES, pad_token_id=padding)
        assert not lacks_padding(transformers.AutoModelForSequenceClassification.from_config(config))
    config = transformers.AutoConfig.for_model("llama", **SIZES, pad_token_id=None)
    assert not lacks_padding(transformers.AutoModelForCausalLM.from_config(config))


def test_an_exported_classifier_reads_each_row_to_its_end(made_once: Callable[..., Path], tmp_path: Path) -> None:
    """With the -1 of the first Llamas, transformers takes the last place of a batch, padding or not."""
    checkpoint = made_once("no-padding", lambda folder: synthesize({**LLAMA, "pad_token_id": -1}, folder, seed=4,
                                                                   dtype="bfloat16"))  # fmt: skip
    bundle = export(checkpoint, tmp_path / "bundle")
    ids, mask = rows()
    with Pipeline.open(bundle.path) as pipeline:
        got = pipeline.run({"input_ids": ids, "attention_mask": mask})["logits"]
    loaded = transformers.LlamaForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    want = one_by_one(loaded, ids)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert verify(bundle.path, checkpoint, seed=1).passed

"""Which of a checkpoint's tensors a model takes."""

from pathlib import Path

import torch
from stageline.exporter import skeleton
from stageline.exporter.weights import find
from stageline.models.checkpoint import Checkpoint
from stageline.models.synthetic import write_random

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99,
}  # fmt: skip


def test_a_stored_buffer_that_transformers_computes_is_ignored(tmp_path: Path) -> None:
    # Old Llama checkpoints hold rotary frequencies, rounded to half precision.
    model = skeleton.build(skeleton.config_of(LLAMA), "text-generation", torch.float32, "eager")
    shapes = skeleton.parameter_shapes(model)
    frequencies = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    shapes["model.rotary_emb.inv_freq"] = ("float32", tuple(frequencies.shape))
    write_random(tmp_path / "checkpoint", LLAMA, shapes, seed=1)
    names = find(Checkpoint.open(tmp_path / "checkpoint"), model).names
    assert "model.rotary_emb.inv_freq" not in names
    assert "model.layers.0.self_attn.q_proj.weight" in names

"""Every architecture, cut at 1 stage, 2 stages and one block a stage, gives what torch gives (eager, float32).

Their weights are bfloat16, with which both sides compute in float32; those of FLOAT32 are float32. STAGELINE_DTYPE
chooses one for all.

Those with windows, sinks, attention of their own or no KV cache do so in test_cached.py."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from parity import check_every_cut, outputs_of, random_inputs, reference
from stageline.exporter import skeleton, tasks
from stageline.exporter.export import export
from stageline.models.synthetic import write_random
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline

TOLERANCE = 1e-5  # the promise is 1e-4; with weights this small, positions that are all wrong move outputs by 1e-3 only
_SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TINY_GPT = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 4,
    "vocab_size": 99,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY_VIT = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

# name -> (model_type, config, class of the checkpoint)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", _SMALL, "BertModel"),
    "bert-classifier": ("bert", _SMALL, "BertForSequenceClassification"),
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 4, "vocab_size": 99, "max_position_embeddings": 64},
        "DistilBertModel",
    ),
    "roberta": ("roberta", {**_SMALL, "bos_token_id": 1, "eos_token_id": 2}, "RobertaForMaskedLM"),
    "albert": ("albert", {**_SMALL, "embedding_size": 16}, "AlbertModel"),
    "electra": ("electra", {**_SMALL, "embedding_size": 16}, "ElectraModel"),
    "modernbert": (
        "modernbert",
        {**_SMALL, "num_hidden_layers": 7, "pad_token_id": 0, "local_attention": 8, "bos_token_id": 1,
         "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        "ModernBertModel",
    ),
    "mpnet": ("mpnet", _SMALL, "MPNetModel"),
    "gpt2": ("gpt2", _TINY_GPT, "GPT2LMHeadModel"),
    "gpt_neox": ("gpt_neox", {**_SMALL, "bos_token_id": 1, "eos_token_id": 2}, "GPTNeoXForCausalLM"),
    "opt": (
        "opt",
        {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 4, "vocab_size": 99,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32, "eos_token_id": 2},
        "OPTForCausalLM",
    ),
    "llama": ("llama", _GROUPED, "LlamaForCausalLM"),
    "qwen2": ("qwen2", _GROUPED, "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}, "Qwen3ForCausalLM"),
    "phi3": ("phi3", _GROUPED, "Phi3ForCausalLM"),
    "olmo2": ("olmo2", _GROUPED, "Olmo2ForCausalLM"),
    "starcoder2": ("starcoder2", {**_GROUPED, "bos_token_id": 1, "eos_token_id": 2}, "Starcoder2ForCausalLM"),
    "vit": ("vit", _TINY_VIT, "ViTForImageClassification"),
    # layer scale, and a width that follows from a ratio
    "dinov2": (
        "dinov2", {k: v for k, v in _TINY_VIT.items() if k != "intermediate_size"}, "Dinov2ForImageClassification",
    ),
    # convolutions, and blocks whose forward is called by name
    "squeezebert": ("squeezebert", {**_SMALL, "embedding_size": 32}, "SqueezeBertModel"),
    # rotary embeddings of part of a head, interleaved
    "gptj": ("gptj", {**_TINY_GPT, "rotary_dim": 4}, "GPTJForCausalLM"),
    # experts, whose tensors are merged from many
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, "MixtralForCausalLM"),
    # a table of relative positions that each block projects with weights of its own
    "deberta-v2": (
        "deberta-v2",
        {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "norm_rel_ebd": "layer_norm"},
        "DebertaV2ForSequenceClassification",
    ),
    # half of what its config describes
    "t5-encoder": (
        "umt5", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4},
        "UMT5EncoderModel",
    ),
}  # fmt: skip
FLOAT32 = {"bert-classifier", "gpt2", "vit", "mixtral", "deberta-v2"}


def synthesize(folder: Path, model_type: str, values: dict[str, Any], saved_as: str, dtype: str = "bfloat16") -> Path:
    """A checkpoint with seeded random weights in `folder`."""
    values = {"model_type": model_type, "architectures": [saved_as], **values}
    config = skeleton.config_of(values)
    model = skeleton.build(config, tasks.task_of(config, None), getattr(torch, dtype), "eager")
    write_random(folder, values, skeleton.parameter_shapes(model), seed=7)
    return folder


@pytest.mark.slow
def test_buffers_that_the_checkpoint_holds_are_taken_from_it(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", image_size=32
    )
    model = transformers.ResNetForImageClassification(config).eval()
    for name, buffer in model.named_buffers():  # the running mean and variance of batch norms
        if buffer.is_floating_point():
            buffer.copy_(1 + torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    model.bfloat16().save_pretrained(tmp_path / "checkpoint")
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle", stages=2)
    inputs = random_inputs(bundle, seed=1)
    with Pipeline.open(tmp_path / "bundle") as pipeline:
        got = pipeline.run(inputs)["logits"]
    want = outputs_of(reference(tmp_path / "checkpoint", "ResNetForImageClassification"), inputs)
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_give_what_torch_gives(name: str, tmp_path: Path) -> None:
    model_type, values, saved_as = ARCHITECTURES[name]
    dtype = os.environ.get("STAGELINE_DTYPE") or ("float32" if name in FLOAT32 else "bfloat16")
    checkpoint = synthesize(tmp_path / "checkpoint", model_type, values, saved_as, dtype)
    bundle = export(checkpoint, tmp_path / "bundle")
    assert bundle.manifest.trace.startswith("stamped"), bundle.manifest.trace
    model = reference(checkpoint, saved_as)
    check_every_cut(bundle.path, model, TOLERANCE)
    if bundle.manifest.cached:
        generates_what_torch_likes_best(tmp_path / "bundle", model)


def generates_what_torch_likes_best(bundle: Path, model: Any) -> None:
    """Greedy tokens of ragged prompts that run together, in chunks: torch, given them, must find none likelier."""
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(3, 99, length).tolist()) for length in (1, 2, 5, 9, 14)]
    sampling = Sampling(max_tokens=12, min_tokens=12)
    with Pipeline.open(bundle, slots=3, prefill_chunk=4) as pipeline:
        futures = [pipeline.submit(GenerationRequest(prompt, sampling)) for prompt in prompts]
        texts = [prompt + future.result().choices[0].token_ids for prompt, future in zip(prompts, futures, strict=True)]
    ends = Bundle.open(bundle).manifest.text
    assert ends is None  # so no token is barred before min_tokens
    for prompt, text in zip(prompts, texts, strict=True):
        ids = np.array([text])
        logits = outputs_of(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        at = np.arange(len(prompt) - 1, len(text) - 1)
        chosen = logits[at, ids[0, at + 1]]
        assert (logits[at].max(axis=1) - chosen).max() <= TOLERANCE

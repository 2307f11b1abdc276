"""Decoders that keep a KV cache generate what transformers does; the others say why not, and are right without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from parity import check_every_cut, reference
from stageline.exporter import skeleton
from stageline.exporter.attention import CacheAttention
from stageline.exporter.blocks import Call
from stageline.exporter.export import export
from stageline.exporter.mask_window import window_of
from stageline.exporter.skeleton import NoCacheError, RefusedError
from stageline.exporter.token_mixing import check_apart
from stageline.exporter.trace import trace
from stageline.models.errors import RequestError
from stageline.runtime.pipeline import Pipeline
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

# Outputs go up to 6.5; the largest error measured is 2.9e-5, and positions that are all wrong move outputs by units.
TOLERANCE = 5e-5
_SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 99,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8, "sliding_window": 6}

CACHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a window everywhere": ("mistral", "MistralForCausalLM", {**_GROUPED, "sliding_window": 6}),
    "a window in some layers": (
        "qwen2", "Qwen2ForCausalLM",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "windows and soft caps": ("gemma2", "Gemma2ForCausalLM", {**_HEADS, "num_hidden_layers": 6}),
    "windows with positions of their own": ("gemma3_text", "Gemma3ForCausalLM", {**_HEADS, "num_hidden_layers": 13}),
    "windows, and no positions elsewhere": ("cohere2", "Cohere2ForCausalLM", {**_GROUPED, "sliding_window": 6}),
    "sinks": (
        "gpt_oss", "GptOssForCausalLM",
        {**_HEADS, "num_hidden_layers": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "attention of its own through torch": ("falcon", "FalconForCausalLM", _SIZES),
    "values narrower than keys": (
        "deepseek_v3", "DeepseekV3ForCausalLM",
        {**_SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
}  # fmt: skip
DTYPES = {"sinks": torch.float32, "windows and soft caps": torch.float16}  # of those whose weights are not bfloat16
UNCACHED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a bias for distance": (
        "bloom", "BloomForCausalLM",
        {"hidden_size": 32, "n_head": 4, "n_layer": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": None,
         "pad_token_id": 0},
        "it does not take the positions of its tokens",
    ),
    "a bias for distance added to the mask": (
        "falcon", "FalconForCausalLM", {**_SIZES, "alibi": True}, "it adds a bias of its own to attention",
    ),
    "convolutions": (
        "lfm2", "Lfm2ForCausalLM",
        {**_GROUPED, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
         "block_auto_adjust_ff_dim": False},
        "its tokens meet outside attention (Conv over tokens)",
    ),
}  # fmt: skip


def synthesize(
    folder: Path, model_type: str, name: str, values: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A checkpoint with weights so large that what a token attends to decides the next."""
    config = transformers.AutoConfig.for_model(model_type, **values)
    config.architectures = [name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
def test_a_model_with_a_cache_generates_what_transformers_generates(name: str, tmp_path: Path) -> None:
    model_type, class_name, values = CACHED[name]
    checkpoint = synthesize(tmp_path / "checkpoint", model_type, class_name, values, DTYPES.get(name, torch.bfloat16))
    bundle = export(checkpoint, tmp_path / "bundle", stages=2)
    assert bundle.manifest.cached, bundle.manifest.trace
    assert bundle.manifest.no_cache_reason is None
    assert bundle.manifest.trace.startswith("full" if name == "a window in some layers" else "stamped")  # 2 + 2 blocks
    model = reference(checkpoint, class_name)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 99, length).tolist() for length in (1, 5, 13, 30)]
    with Pipeline.open(bundle.path, slots=3, prefill_chunk=5) as pipeline:
        generations = [pipeline.generate(prompt, max_tokens=12, logprobs=0) for prompt in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            choice = generation.result(60).choices[0]
            given = torch.tensor([prompt])
            with torch.no_grad():
                want = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12)
                scores = model(torch.cat([given, torch.tensor([choice.token_ids])], 1)).logits.double().log_softmax(-1)
            assert list(choice.token_ids) == want[0, len(prompt) :].tolist()
            expected = scores[0, len(prompt) - 1 : -1][torch.arange(12), list(choice.token_ids)]
            np.testing.assert_allclose([entry.logprob for entry in choice.logprobs], expected, atol=1e-4)
    check_every_cut(bundle.path, model, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCACHED)
def test_a_model_that_cannot_keep_a_cache_says_why_and_gives_what_torch_gives(name: str, tmp_path: Path) -> None:
    model_type, class_name, values, why = UNCACHED[name]
    checkpoint = synthesize(tmp_path / "checkpoint", model_type, class_name, values)
    message: list[str] = []
    bundle = export(checkpoint, tmp_path / "bundle", stages=2, progress=message.append)
    assert not bundle.manifest.cached
    assert bundle.manifest.no_cache_reason == why
    assert f"tracing without a KV cache ({why})" in message
    check_every_cut(bundle.path, reference(checkpoint, class_name), TOLERANCE)
    with Pipeline.open(bundle.path) as pipeline, pytest.raises(RequestError) as refused:
        pipeline.generate([5])
    assert str(refused.value) == f"this bundle does not generate: {why}; run batches with Pipeline.run"


MEETING = {
    "Pad along the tokens": lambda x: torch.nn.functional.pad(x, (0, 0, 1, -1)),
    "CumSum over tokens": lambda x: x + x.cumsum(1),
    "ReduceMean along the tokens": lambda x: x - x.mean(1, keepdim=True),
    "Slice takes some tokens": lambda x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1),
}


class Layer(torch.nn.Module):
    """A layer to which something is done before it [batch, length, width]."""

    inputs = (skeleton.Input("x", torch.float32, ("batch", "length", 8)),)
    output_names = ("y",)

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change, self.model = change, torch.nn.Linear(8, 8)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(self.change(tensors[0])),)


@pytest.mark.parametrize("message", MEETING)
def test_layers_in_which_tokens_meet_are_found(message: str) -> None:
    layer: Any = Layer(MEETING[message]).eval()
    traced = trace(layer, (torch.ones(layer.inputs[0].sample_shape()),), [], [], frozenset())
    with pytest.raises(NoCacheError, match=rf"^its tokens meet outside attention \({message}"):
        check_apart(traced.model.graph)


def llama(folder: Path) -> Path:
    return synthesize(folder, "llama", "LlamaForCausalLM", {**_GROUPED, "num_hidden_layers": 2})


def test_a_model_whose_layers_let_tokens_meet_keeps_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a Llama whose MLPs get the token before."""
    forward = modeling_llama.LlamaMLP.forward

    def changed(module: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(module, MEETING["Pad along the tokens"](x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", changed)
    checkpoint = llama(tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "bundle")
    assert not bundle.manifest.cached
    assert "its tokens meet outside attention (Pad along the tokens" in str(bundle.manifest.no_cache_reason)
    check_every_cut(bundle.path, reference(checkpoint, "LlamaForCausalLM"), TOLERANCE)


def chunks_of_four(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key // 4 == query // 4


def prefix_of_three(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key < 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"or_mask_function": prefix_of_three}, "its attention is not causal"),
        ({"or_mask_function": bidirectional_mask_function}, "its attention is not causal"),
        ({"and_mask_function": chunks_of_four}, "its masks are neither causal nor of a sliding window"),
        (
            {"and_mask_function": sliding_window_causal_mask_function(4)},
            "its masks have a window of 4 tokens, its attention names None",
        ),
    ],
)
def test_masks_that_the_operator_cannot_say_are_refused(
    change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_masks(monkeypatch, change)
    with pytest.raises(RefusedError) as refused:
        watched({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_GROUPED, "num_hidden_layers": 2})
    assert str(refused.value) == message


def watched(values: dict[str, Any]) -> list[Call]:
    """The blocks of the model with this config.json, run with the operator."""
    attention, mode = CacheAttention(), skeleton.fake_mode()
    with attention.installed():
        model = skeleton.build(skeleton.config_of(values), "text-generation", torch.float32, attention.implementation)
        skeleton.fake_weights(model, mode, ())
        task = attention.wrap(model, torch.float32, "text-generation", None).eval()
        samples = tuple(torch.ones(spec.sample_shape(), dtype=spec.dtype) for spec in task.inputs)
        with mode, torch.no_grad():
            return attention.watch(task, samples)


def test_a_mask_that_no_layer_uses_does_not_matter() -> None:
    """Gemma 3 makes masks with and without a window, also if all its layers have one."""
    values = {"model_type": "gemma3_text", **_GROUPED, "num_hidden_layers": 2, "sliding_window": 4,
              "layer_types": ["sliding_attention"] * 2}  # fmt: skip
    assert len(watched(values)) == 2


def test_a_model_with_masks_that_the_operator_cannot_say_keeps_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_masks(monkeypatch, {"or_mask_function": prefix_of_three})
    checkpoint = llama(tmp_path / "checkpoint")
    bundle = export(checkpoint, tmp_path / "bundle")
    assert not bundle.manifest.cached
    assert bundle.manifest.no_cache_reason == "its attention is not causal"
    check_every_cut(bundle.path, reference(checkpoint, "LlamaForCausalLM"), TOLERANCE)


def change_masks(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    make = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **given: make(**given, **change))


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 100, 101, 4096, 1 << 19])
def test_a_window_is_read_from_the_mask(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window)) == window


def test_a_causal_mask_has_no_window() -> None:
    assert window_of(causal_mask_function) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (bidirectional_mask_function, "not causal"),
        (or_masks(causal_mask_function, prefix_of_three), "not causal"),
        (and_masks(causal_mask_function, lambda b, h, q, k: k % 2 == 0), "neither causal nor of a sliding window"),
        (
            and_masks(causal_mask_function, lambda b, h, q, k: k // 8 == q // 8),
            "neither causal nor of a sliding window",
        ),
        (lambda b, h, q, k: k < q, "neither causal nor of a sliding window"),
        (lambda b, h, q, k: {}[0], "depend on more than the places of the tokens"),
    ],
)
def test_other_masks_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        window_of(mask)


@pytest.mark.slow
def test_a_branch_on_the_number_of_tokens_keeps_no_cache_and_limits_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of many tokens, and one of a single token after them, would go through different branches."""
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) * (2 if x.shape[1] > 16 else 1))
    checkpoint = synthesize(tmp_path / "checkpoint", "llama", "LlamaForCausalLM", {**_GROUPED, "num_hidden_layers": 2})
    manifest = export(checkpoint, tmp_path / "bundle").manifest
    assert (manifest.cached, manifest.max_positions) == (False, 16)
    assert manifest.no_cache_reason == "it computes more than 16 tokens at a time in another way"

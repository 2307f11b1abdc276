"""What the metadata of each .gguf architecture means in terms of a transformers config.

The names of the keys are those of `gguf.constants.Keys`; what llama.cpp computes from them, and the values it takes for
keys that are absent, are in its `src/llama-model.cpp`. transformers has such a table too, which drops keys that change
the computation (the epsilon of a LayerNorm, the base of rotary positions, soft caps), so it is not used here.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

Metadata = Mapping[str, Any]

_SHAPE = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS = {**_SHAPE, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture: `model_type` is transformers' name for it."""

    model_type: str
    keys: Mapping[str, str]
    """Metadata key, without the architecture's name before it -> attribute of the config. Each must be in the file."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """The same for keys that may be absent; then `fixed` or the config's default holds."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that the architecture implies."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Attribute of the config -> the tensor of block 0 that is in the file if, and only if, it is true."""
    head_dim: bool = True
    """Whether the config states the size of a head; without, it is the width divided by the number of heads."""
    rotary: bool = True
    partial_rotary: bool = False
    """Whether the model can rotate a part of each head."""
    ignored: frozenset[str] = frozenset()
    """Keys that llama.cpp reads elsewhere, but not for this architecture."""
    more: Callable[[Metadata, dict[str, Any], Container[str]], dict[str, Any]] = lambda metadata, config, tensors: {}
    """Attributes that need more than one key: called with the keys, without the architecture's name before them, the
    config so far, and the names of the tensors."""
    more_keys: frozenset[str] = frozenset()
    """The keys that `more` reads."""


def _gemma2(metadata: Metadata, config: dict[str, Any], tensors: Container[str]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _gemma_scale(config, largest=46)}


def _gemma3(metadata: Metadata, config: dict[str, Any], tensors: Container[str]) -> dict[str, Any]:
    blocks = range(config["num_hidden_layers"])
    pattern = metadata.get("attention.sliding_window_pattern", 6)
    slides = pattern if isinstance(pattern, list) else [(block + 1) % pattern != 0 for block in blocks]
    return {
        "query_pre_attn_scalar": _gemma_scale(config, largest=62),
        "layer_types": ["sliding_attention" if slides[block] else "full_attention" for block in blocks],
    }


def _gemma_scale(config: dict[str, Any], largest: int) -> int:
    """Gemma divides scores by the root of this. llama.cpp knows the 27B model, which differs, by its depth."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(metadata: Metadata, config: dict[str, Any], tensors: Container[str]) -> dict[str, Any]:
    """Phi-3's config has a default of its own for where long rows begin, which would replace that of the file."""
    context = config["max_position_embeddings"]
    return {"original_max_position_embeddings": metadata.get("rope.scaling.original_context_length", context)}


def _stablelm(metadata: Metadata, config: dict[str, Any], tensors: Container[str]) -> dict[str, Any]:
    """llama.cpp asks the tensors as well: converters state use_parallel_residual for models without."""
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama",
        _RMS,
        flags={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
    ),
    "qwen2": Architecture("qwen2", _RMS),
    "qwen3": Architecture("qwen3", _RMS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        {
            **_RMS,
            **_EXPERTS,
            "expert_count": "num_experts",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        fixed={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", {**_RMS, **_EXPERTS, "expert_count": "num_experts"}, fixed={"norm_topk_prob": True}
    ),
    "gemma2": Architecture(
        "gemma2",
        _RMS,
        optional={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        more=_gemma2,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {**_RMS, "attention.sliding_window": "sliding_window"},
        optional={"final_logit_softcapping": "final_logit_softcapping"},
        fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None},
        more=_gemma3,
        more_keys=frozenset({"attention.sliding_window_pattern"}),
    ),
    "phi3": Architecture(
        "phi3",
        _RMS,
        optional={"attention.sliding_window": "sliding_window"},
        fixed={"sliding_window": None},
        head_dim=False,
        partial_rotary=True,
        more=_phi3,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_SHAPE, "attention.layer_norm_epsilon": "norm_epsilon"},
        fixed={"sliding_window": None},
        flags={"use_bias": "attn_q.bias"},
    ),
    "stablelm": Architecture(
        "stablelm",
        {**_SHAPE, "attention.layer_norm_epsilon": "layer_norm_eps"},
        fixed={"qk_layernorm": False},
        flags={"use_qkv_bias": "attn_q.bias"},
        ignored=frozenset({"use_parallel_residual"}),
        more=_stablelm,
        head_dim=False,
        partial_rotary=True,
    ),
    "nemotron": Architecture(
        "nemotron",
        {**_SHAPE, "attention.layer_norm_epsilon": "norm_eps"},
        flags={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
        partial_rotary=True,
    ),
    "falcon": Architecture(
        "falcon",
        {**_SHAPE, "attention.layer_norm_epsilon": "layer_norm_epsilon"},
        fixed={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
        flags={"bias": "attn_qkv.bias"},
        head_dim=False,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        head_dim=False,
        rotary=False,
    ),
}
"""By the name that `general.architecture` states."""

MIXTRAL = Architecture(
    "mixtral", {**_RMS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
)
"""What the architecture `llama` is if it has experts."""

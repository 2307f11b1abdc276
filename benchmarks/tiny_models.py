"""Tiny random checkpoints of any architecture that transformers has, for benchmarks/architectures.py.

A config's defaults are shrunk by the names of its sizes; a few architectures need values of their own.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCABULARY = 99
POSITIONS = 128
END = 2
"""The token that ends a text, for classes that read it and do not generate."""
_WIDTH, _HEADS, _LAYERS = 32, 4, 2

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "max_seq_len", "context_length", "model_max_length",
            "original_max_position_embeddings", "seq_length", "n_ctx", "max_sequence_length", "attention_window_size",
        ),
        POSITIONS,
    ),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size", "emb_dim",
            "attention_hidden_size", "lru_width", "embed_dim", "backbone_hidden_size", "embedding_dim",
            "input_embedding_size", "output_embedding_size", "mm_hidden_size", "projection_dim",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
            "num_encoder_layers", "num_decoder_layers",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads",
            "decoder_attention_heads", "swa_num_attention_heads", "num_encoder_attention_heads",
            "num_decoder_attention_heads", "linear_num_value_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_kv_heads", "n_head_kv"), 2
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "dim_head"), 8),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "hidden_dim",
            "dim_ff", "dff", "d_ff", "intermediate_size_mlp", "d_inner", "feed_forward_size", "mlp_dim",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
            "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
            "dense_intermediate_size",
        ),
        16,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_chunk_size"), 6),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), 8),
    "v_head_dim": 12, "index_n_heads": 2, "index_topk": 256, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_chunk_size": 16,
    "chunk_size": 16, "mamba_n_groups": 1, "mamba_dt_rank": 4, "time_step_rank": 4, "image_size": 32, "patch_size": 8,
    "laurel_rank": 4, "hidden_size_per_layer_input": 8, "query_pre_attn_scalar": 8,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
"""What a size of this name becomes, where a config has it."""
_MULTIMODAL_IDS = {
    name: 98 - place
    for place, name in enumerate(
        (
            "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
            "audio_token_index", "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
            "boa_token_id", "eoa_token_id", "eoa_token_index", "vision_start_token_id", "vision_end_token_id",
        )
    )
}  # fmt: skip
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dots1": {"layer_types": None, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "intermediate_size": [48] * 4,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 20},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "musicgen": {"dropout": 0.0},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "neomme": {"head_dim": 16},
    "perceiver": {"num_latents": 8, "d_latents": 32},
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
        for kind in (
            "qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text", "paddleocr_vl_text",
            "ernie4_5_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text",
        )
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_hidden_layers": 2},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 7},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Values of a model_type that the rules get wrong; nested ones for parts of the config."""

REFERENCES = {"Llama4ForConditionalGeneration": "Llama4ForCausalLM"}
"""Classes that transformers 5.24 cannot run itself -> the class of their text part."""


def shrunk(config: Any, kind: str) -> dict[str, Any]:
    """The values that make the config of model_type `kind` tiny, from an instance with the defaults."""
    stated = config.to_dict()
    values = {
        key: size
        for key, size in (SIZES | _MULTIMODAL_IDS).items()
        if key in stated and (size is None or stated[key] is None or type(size) is type(stated[key]))
    }
    if stated.get("kv_lora_rank") and "num_key_value_heads" in stated:
        values["num_key_value_heads"] = _HEADS  # latent attention makes keys for each head
    rotary = stated.get("rope_parameters") or {}
    if "mrope_section" in rotary:
        values["rope_parameters"] = {**rotary, "mrope_section": [2, 1, 1]}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            values[name] = {"model_type": part.model_type, **shrunk(part, part.model_type)}
    for key, value in EXCEPTIONS.get(kind, {}).items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if nested else value
    return values


def tiny_config(kind: str) -> Any:
    """The config of model_type `kind`, a few thousand parameters large."""
    return transformers.AutoConfig.for_model(kind, **shrunk(transformers.CONFIG_MAPPING[kind](), kind))


def make(kind: str, class_name: str, folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    """Save a checkpoint of `class_name` with seeded weights of `dtype`, so large that what a token attends to decides
    the next; `changes` are values of the config. Returns the model in float32."""
    config = tiny_config(kind)
    config.update(changes)
    if class_name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and hasattr(config, "is_decoder"):
        config.is_decoder = True  # a type that reads texts both ways generates only so
    found = getattr(transformers, class_name)
    if not found.can_generate() and hasattr(config, "eos_token_id"):
        config.eos_token_id = END
    torch.manual_seed(0)
    model = found(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    model.to(dtype).save_pretrained(folder)
    if model.main_input_name == "pixel_values" and getattr(config, "image_size", None) is None:
        size = {"height": SIZES["image_size"], "width": SIZES["image_size"]}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)  # states the size that the config does not
    reference = getattr(transformers, REFERENCES.get(class_name, class_name))
    return reference.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

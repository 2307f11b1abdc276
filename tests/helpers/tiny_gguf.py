"""Small .gguf files of transformers' models, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "</s>", *ALPHABET, "ab"]
VOCABULARY = len(TOKENS)
Value = Any


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in the order of `ggml_rope`'s neighbouring pairs: [width, ...] -> [width, ...]."""
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rotated_heads(config: Any, name: str) -> int | None:
    """How many heads a Llama's query or key tensor has; None for other tensors."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else None


def llama_layout(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    heads = rotated_heads(config, name)
    return values if heads is None else permuted(values, heads)


def as_it_is(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    return values


def one_more(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    return values + 1 if name.endswith("norm.weight") else values


def transposed(config: Any, name: str, values: np.ndarray) -> np.ndarray:
    return values.T if values.ndim == 2 and name.startswith("blk.") else values


LAYOUTS: dict[str, Callable[[Any, str, np.ndarray], np.ndarray]] = {
    "llama": llama_layout,
    "gemma2": one_more,
    "gemma3": one_more,
    "nemotron": one_more,
    "gpt2": transposed,
}


def tensors_of(model: torch.nn.Module, arch: str) -> dict[str, np.ndarray]:
    """The model's tensors by the names and in the layout of a .gguf; a head that is tied is left out."""
    config: Any = model.config
    found = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(found, config.num_hidden_layers)
    layout = LAYOUTS.get(arch, as_it_is)
    tensors: dict[str, np.ndarray] = {}
    for parameter, held in dict(model.named_parameters()).items():
        values = held.detach().float().numpy()
        stem, _, suffix = parameter.rpartition(".")
        if ".experts." in parameter:
            block = f"blk.{parameter.split('.')[2]}"
            parts = {"gate": values[:, : values.shape[1] // 2], "up": values[:, values.shape[1] // 2 :]}
            parts = parts if suffix == "gate_up_proj" else {"down": values}
            tensors |= {f"{block}.ffn_{part}_exps.weight": value for part, value in parts.items()}
            continue
        name = names.get_name(stem)
        assert name is not None, parameter
        if "shared_expert_gate" in parameter:
            values = values[0]
        tensors[f"{name}.{suffix}"] = layout(config, f"{name}.{suffix}", values)
    return tensors


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    arch: str,
    keys: Mapping[str, Value] | None = None,
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    quantise: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = gguf.quants.quantize,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    leave_out: Iterable[str] = (),
) -> Path:
    """Write the model; matrices of `kind`, vectors in float32, blocks of types other than F32 and F16 by `quantise`.

    `keys` lack the architecture's name (`rope.freq_base`); None takes away one that is there by default. `extra` are
    tensors by name.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**keys_of(model, arch), **(keys or {})}.items():
        if value is not None:
            add(
                writer,
                key if key.startswith(("general.", "tokenizer.", "split.", "quantize.")) else f"{arch}.{key}",
                value,
            )
    (tokenizer or byte_level)(writer)
    for name, values in {**tensors_of(model, arch), **(extra or {})}.items():
        if name in leave_out:
            continue
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        values = np.ascontiguousarray(values, dtype=np.float32)
        if stored == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        elif stored == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantise(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """One metadata value, with the type that a converter gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def keys_of(model: torch.nn.Module, arch: str) -> dict[str, Value]:
    """The keys that every converted model has."""
    config: Any = model.config
    layer_norm = arch in ("gpt2", "falcon", "starcoder2", "stablelm", "nemotron")
    eps = "attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"
    stated = ("layer_norm_epsilon", "rms_norm_eps", "norm_epsilon", "layer_norm_eps", "norm_eps")
    found = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        eps: next(float(getattr(config, name)) for name in stated if hasattr(config, name)),
    }
    if arch == "gpt2":
        return found
    kv = 1 if arch == "falcon" else config.num_key_value_heads
    rope: Any = config.rope_parameters
    rope = rope.get("full_attention", rope)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = rope.get("partial_rotary_factor", 1.0)
    found |= {"attention.head_count_kv": kv, "rope.freq_base": float(rope["rope_theta"])}
    return {**found, "rope.dimension_count": int(size * share), "attention.key_length": size,
            "attention.value_length": size}  # fmt: skip


def byte_level(writer: gguf.GGUFWriter) -> None:
    """A tokenizer of bytes and one merge, split as Llama 3 splits."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

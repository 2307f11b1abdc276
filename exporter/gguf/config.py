"""The config of a .gguf file, made from its metadata: every key is understood, without effect, or stops the export."""

from collections.abc import Iterator
from typing import Any

import gguf
from stageline.exporter.gguf import rotary
from stageline.exporter.gguf.architectures import ARCHITECTURES, MIXTRAL, Architecture, Metadata
from stageline.exporter.gguf.tensors import check_types, dequantised
from stageline.exporter.gguf.tokenizer import end_ids, tokenizer_notes
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_NO_EFFECT = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
}
"""Values with which a key changes nothing; that of every other key is 0."""
_CHANGES = ("clip.", "adapter.", "diffusion.", "xielu.")  # prefixes of keys that llama.cpp computes with
_EMBEDDING = "pooling_type"


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a config.json would hold. ExportError if the metadata lacks something or states what is not understood."""
    architecture, keys = _keys(checkpoint)
    known = _architecture(checkpoint)
    check_types(checkpoint)
    tensors = checkpoint.tensors
    try:
        result = {**known.fixed, **_stated(checkpoint, known, keys)}
        result["vocab_size"] = _vocabulary(checkpoint, keys)
        result["tie_word_embeddings"] = "output.weight" not in tensors
        result |= {attribute: f"blk.0.{tensor}" in tensors for attribute, tensor in known.flags.items()}
        head_dim = _head_dim(result, known, keys)
        result |= {"head_dim": head_dim} if known.head_dim else {}
        result |= known.more(keys, result, tensors)
        if known.rotary:
            result["rope_parameters"] = _rope(checkpoint, keys, head_dim, known)
        _check_rest(checkpoint, known, keys, head_dim)
        window = result.get("sliding_window")
        if window is not None and known.model_type == "phi3" and window >= result["max_position_embeddings"]:
            result["sliding_window"] = None
    except (ExportError, ArithmeticError, IndexError, TypeError, ValueError) as error:
        raise ExportError(
            f"{checkpoint.path}: {error} (architecture {architecture!r}); export the Hugging Face checkpoint that the "
            "file was made of"
        ) from error
    ids = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    result |= {ours: checkpoint.config.get(f"tokenizer.ggml.{theirs}") for ours, theirs in ids.items()}
    ends = end_ids(checkpoint)
    result["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[known.model_type]
    return {"model_type": known.model_type, "architectures": [named], **result}


def notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know of the file, each a sentence without its full stop."""
    architecture = checkpoint.config["general.architecture"]
    prefix = f"{architecture}."
    unknown = sorted(key for key in checkpoint.config if key.startswith(prefix) and not _known_to_gguf(key, prefix))
    found = [f"metadata that gguf does not know is not read: {', '.join(unknown)}"] if unknown else []
    advice = {key.removeprefix("general.sampling."): value for key, value in checkpoint.config.items()
              if key.startswith("general.sampling.")}  # fmt: skip
    if advice:
        listed = ", ".join(f"{name} {value}" for name, value in sorted(advice.items()))
        found.append(f"the file recommends sampling with {listed}; give them with each request")
    return [*found, *tokenizer_notes(checkpoint)]


def _architecture(checkpoint: Checkpoint) -> Architecture:
    name, keys = _keys(checkpoint)
    if name == "llama" and keys.get("expert_count", 0):
        return MIXTRAL
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{checkpoint.path} has the architecture {name!r}; .gguf files are read of {', '.join(ARCHITECTURES)}. "
            "Export the Hugging Face checkpoint that the file was made of"
        )
    return ARCHITECTURES[name]


def _keys(checkpoint: Checkpoint) -> tuple[str, Metadata]:
    """The architecture, and the keys that are about it without its name before them."""
    name = checkpoint.config.get("general.architecture")
    if not isinstance(name, str):
        raise ExportError(f"{checkpoint.path} states no general.architecture; convert the model again")
    prefix = f"{name}."
    return name, {k.removeprefix(prefix): v for k, v in checkpoint.config.items() if k.startswith(prefix)}


def _stated(checkpoint: Checkpoint, known: Architecture, keys: Metadata) -> dict[str, Any]:
    """The attributes of the config that one key each states."""
    values = {key: _one_for_all(key, value) for key, value in keys.items() if key in {**known.keys, **known.optional}}
    if "attention.head_count_kv" in known.keys and "attention.head_count" in values:
        values.setdefault("attention.head_count_kv", values["attention.head_count"])
    for key in known.keys:
        if key not in values:
            raise ExportError(f"the metadata lacks {key}")
    return {attribute: values[key] for key, attribute in {**known.keys, **known.optional}.items() if key in values}


def _one_for_all(key: str, value: Any) -> Any:
    """The one value of a list that states it for every block."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ExportError(f"{key} differs from block to block ({value})")
    return value[0]


def _vocabulary(checkpoint: Checkpoint, keys: Metadata) -> int:
    embedding = checkpoint.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ExportError("it has no token_embd.weight")
    rows = embedding.shape[0]
    if keys.get("vocab_size", rows) != rows:
        raise ExportError(f"vocab_size is {keys['vocab_size']}, but token_embd.weight has {rows} rows")
    return rows


def _head_dim(result: dict[str, Any], known: Architecture, keys: Metadata) -> int:
    width = int(result.get("hidden_size", result.get("n_embd", 0)))
    heads = int(result.get("num_attention_heads", result.get("n_head", 0)))
    if heads < 1 or width < 1:
        raise ExportError(f"embedding_length is {width} and attention.head_count {heads}")
    size = int(keys.get("attention.key_length", width // heads))
    if keys.get("attention.value_length", size) != size:
        raise ExportError(f"attention.key_length is {size} and value_length {keys['attention.value_length']}")
    if not known.head_dim and size * heads != width:
        raise ExportError(f"attention.key_length is {size}, {heads} heads make {width}")
    return size


def _rope(checkpoint: Checkpoint, keys: Metadata, head_dim: int, known: Architecture) -> dict[str, Any]:
    held = {name: dequantised(checkpoint.stored[name]) for name in rotary.TENSORS if name in checkpoint.tensors}
    context = int(keys["context_length"])
    full = rotary.rope_parameters(keys, held, head_dim, context, known.partial_rotary)
    if known.model_type != "gemma3_text":
        return full
    local = {"rope_theta": float(keys.get("rope.freq_base_swa", 10000.0)), "rope_type": "default"}
    return {"full_attention": full, "sliding_attention": local}


def _check_rest(checkpoint: Checkpoint, known: Architecture, keys: Metadata, head_dim: int) -> None:
    """ExportError for a key that changes the computation and was not read."""
    read = {*known.keys, *known.optional, *known.more_keys, *known.ignored, "vocab_size", *_NO_EFFECT}
    read |= {"attention.key_length", "attention.value_length", *(rotary.KEYS if known.rotary else ())}
    for key, value in keys.items():
        if key in read or not _known_to_gguf(f"{{arch}}.{key}", "{arch}."):
            continue
        neutral = _NEUTRAL.get(key, (0,))
        if key == "attention.scale":
            neutral = (0, head_dim**-0.5)
        if key == "attention.sliding_window" and value >= keys["context_length"]:
            continue
        if not any(_near(value, harmless) for harmless in neutral):
            what = " makes it an embedding model, which" if key == _EMBEDDING else ""
            raise ExportError(f"{key} = {value!r}{what} is not read from a .gguf")
    for key in checkpoint.config:
        if key.startswith(_CHANGES):
            raise ExportError(f"{key} = {checkpoint.config[key]!r} is not read from a .gguf")


def _near(value: Any, harmless: Any) -> bool:
    return isinstance(value, (bool, int, float)) and abs(float(value) - float(harmless)) <= 1e-6


def _known_to_gguf(key: str, prefix: str) -> bool:
    """Whether gguf, and so llama.cpp, has a meaning for the key."""
    return "{arch}." + key.removeprefix(prefix) in _GGUF_KEYS


def _all_keys(space: type) -> Iterator[str]:
    for name, value in vars(space).items():
        if isinstance(value, type):
            yield from _all_keys(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value


_GGUF_KEYS = frozenset(_all_keys(gguf.Keys)) | {"{arch}.rope.scale_linear"}

"""Rotary positions as a .gguf file states them: base, scaling, and factors of their own for every pair of dimensions.

llama.cpp turns pair `i` of the `d` rotated dimensions, at position `p`, by `p * scale / (base ** (2 i / d) * factor_i)`
(`ggml_rope_ext`): `scale` is 1 / `rope.scaling.factor`, and the factors are those of the tensor `rope_freqs.weight`
(llama 3) or `rope_factors_short.weight` and `rope_factors_long.weight` (Phi-3). Linear scaling, YaRN and LongRoPE are
types of transformers too. Any other factors are the type FACTORS, which this module adds to transformers' table.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stageline.models.errors import ExportError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FACTORS = "stageline-factors"

KEYS = frozenset({
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
})  # fmt: skip
"""The metadata keys that are understood here, without the architecture's name before them."""

TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rope_parameters(
    metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], head_dim: int, context: int, partial: bool
) -> dict[str, Any]:
    """transformers' rope_parameters. `metadata` has the keys without the architecture's name, `tensors` those of
    TENSORS that the file has, each float32 [pairs]. ExportError for what has no equal in transformers."""
    rotated = int(metadata.get("rope.dimension_count", head_dim))
    if rotated != head_dim and not (partial and 0 < rotated < head_dim):
        raise ExportError(f"rope.dimension_count is {rotated} of the {head_dim} dimensions of a head")
    result: dict[str, Any] = {"rope_theta": float(metadata.get("rope.freq_base", 10000.0)), "rope_type": "default"}
    if partial:
        share = rotated / head_dim
        result["partial_rotary_factor"] = share if int(head_dim * share) == rotated else (rotated + 0.5) / head_dim
    for name, values in tensors.items():
        if values.shape != (rotated // 2,) or not np.isfinite(values).all() or (values <= 0).any():
            raise ExportError(f"{name} has shape {list(values.shape)}; {rotated // 2} positive numbers are needed")
    return {**result, **_scaling(metadata, tensors, context)}


def _scaling(metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], context: int) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type", "linear")  # as llama.cpp assumes if the file has a factor alone
    stretch = float(metadata.get("rope.scaling.factor", 0) or metadata.get("rope.scale_linear", 0) or 1)
    attention = float(metadata.get("rope.scaling.attn_factor", 1))
    original = int(metadata.get("rope.scaling.original_context_length", context))
    short, long = tensors.get("rope_factors_short.weight"), tensors.get("rope_factors_long.weight")
    factors = tensors.get("rope_freqs.weight")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ExportError(f"rope.scaling.type is {kind!r}; known are none, linear, yarn and longrope")
    if short is not None and long is not None:
        if factors is not None or (kind == "yarn" and stretch != 1):
            raise ExportError("rope_factors_long.weight comes with another scaling of the rotary positions")
        extra = {"factor": context / original, "original_max_position_embeddings": original}
        lists = {"short_factor": short.tolist(), "long_factor": long.tolist()}
        return {"rope_type": "longrope", **lists, "attention_factor": attention, **extra}
    if short is not None or long is not None or kind == "longrope":
        raise ExportError("of rope_factors_long.weight and rope_factors_short.weight it holds only one or none")
    if kind == "yarn":
        if factors is not None:
            raise ExportError("rope_freqs.weight comes with another scaling of the rotary positions")
        return {
            "rope_type": "yarn",
            "factor": stretch,
            "original_max_position_embeddings": original,
            "attention_factor": attention * (1 + 0.1 * math.log(stretch) if stretch > 1 else 1),
            "beta_fast": float(metadata.get("rope.scaling.yarn_beta_fast", 32)),
            "beta_slow": float(metadata.get("rope.scaling.yarn_beta_slow", 1)),
        }
    stretch = 1.0 if kind == "none" else stretch
    if factors is not None or attention != 1:
        every = stretch * (1 if factors is None else factors.astype(np.float64))
        return {"rope_type": FACTORS, "factors": np.atleast_1d(every).tolist(), "attention_factor": attention}
    return {} if stretch == 1 else {"rope_type": "linear", "factor": stretch}


def _init_factors(
    config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[torch.Tensor, float]:
    """The inverse frequencies float32 [pairs] of the type FACTORS, and what cosine and sine are multiplied by."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    factors = torch.tensor(parameters["factors"], dtype=torch.float32, device=device)
    return 1.0 / (parameters["rope_theta"] ** exponents * factors), float(parameters["attention_factor"])


ROPE_INIT_FUNCTIONS[FACTORS] = _init_factors

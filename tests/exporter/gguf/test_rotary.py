"""Rotary positions turn as llama.cpp turns them, by its formula written out here, whatever the file states."""

import math
from typing import Any

import numpy as np
import pytest
import transformers
from stageline.exporter.gguf.rotary import rope_parameters
from stageline.models.errors import ExportError

HEAD, CONTEXT, BASE = 32, 512, 5e4
KEYS = {"rope.freq_base": BASE, "rope.dimension_count": HEAD}
FACTORS = np.linspace(1, 8, HEAD // 2).astype(np.float32)


def turned(
    scale: float = 1.0, factors: Any = 1.0, yarn: tuple[float, float, int] | None = None, pairs: int = HEAD // 2
) -> np.ndarray:
    """The angle of each pair at position 1, float64 [pairs], as `ggml_rope_ext` computes it; `yarn`: beta_fast,
    beta_slow and the original context."""
    free = BASE ** (-np.arange(pairs) / pairs) / factors
    if yarn is None:
        return np.asarray(free * scale)
    fast, slow, original = yarn
    dims = [2 * pairs * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(BASE)) for beta in (fast, slow)]
    low, high = max(0, math.floor(dims[0])), min(2 * pairs - 1, math.ceil(dims[1]))
    ramp = 1 - np.clip((np.arange(pairs) - low) / max(0.001, high - low), 0, 1)
    return np.asarray(free * scale * (1 - ramp) + free * ramp)


def rotary(keys: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, partial: bool = False) -> Any:
    """The rotary module that transformers makes of the metadata."""
    parameters = rope_parameters({**KEYS, **keys}, tensors or {}, HEAD, CONTEXT, partial)
    common: dict[str, Any] = {"hidden_size": 4 * HEAD, "num_attention_heads": 4, "num_hidden_layers": 1}
    common |= {"vocab_size": 8, "intermediate_size": 8, "max_position_embeddings": CONTEXT, "pad_token_id": 0}
    kind = transformers.Phi3Config if partial else transformers.LlamaConfig
    return transformers.AutoModel.from_config(kind(**common, rope_parameters=parameters)).rotary_emb


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
FREQS = {"rope_freqs.weight": FACTORS}
SIZE = 1 + 0.1 * math.log(4)


@pytest.mark.parametrize(
    ("keys", "tensors", "angles", "magnitude"),
    [
        ({}, {}, turned(), 1),
        (LINEAR, {}, turned(1 / 4), 1),
        ({"rope.scaling.factor": 4.0}, {}, turned(1 / 4), 1),  # a factor alone is linear
        ({"rope.scale_linear": 2.0}, {}, turned(1 / 2), 1),  # as old files state it
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}, turned(), 1),
        ({}, FREQS, turned(1, FACTORS), 1),
        (LINEAR, FREQS, turned(1 / 4, FACTORS), 1),
        ({**LINEAR, "rope.scaling.attn_factor": 1.5}, {}, turned(1 / 4), 1.5),
        (YARN, {}, turned(1 / 4, yarn=(32, 1, 128)), SIZE),
        ({**YARN, "rope.scaling.attn_factor": 0.5}, {}, turned(1 / 4, yarn=(32, 1, 128)), SIZE / 2),
        ({**YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}, {},
         turned(1 / 4, yarn=(16, 2, 128)), SIZE),
        ({**YARN, "rope.scaling.original_context_length": CONTEXT}, {}, turned(1 / 4, yarn=(32, 1, CONTEXT)), SIZE),
    ],
)  # fmt: skip
def test_angles_are_those_of_llama_cpp(
    keys: dict[str, Any], tensors: dict[str, np.ndarray], angles: np.ndarray, magnitude: float
) -> None:
    module = rotary(keys, tensors)
    np.testing.assert_allclose(module.inv_freq.numpy(), angles, rtol=1e-5)
    assert module.attention_scaling == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize("rotated", [4, 10, 24])
def test_a_part_of_each_head_turns(rotated: int) -> None:
    module = rotary({"rope.dimension_count": rotated}, partial=True)
    np.testing.assert_allclose(module.inv_freq.numpy(), turned(pairs=rotated // 2), rtol=1e-5)


def test_long_and_short_factors_are_longrope() -> None:
    tensors = {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS}
    keys = {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.19}
    found = rope_parameters({**KEYS, **keys}, tensors, HEAD, CONTEXT, partial=False)
    assert found["rope_type"] == "longrope"
    assert (found["short_factor"], found["long_factor"]) == (FACTORS.tolist(), (2 * FACTORS).tolist())
    assert (found["original_max_position_embeddings"], found["attention_factor"]) == (128, 1.19)
    assert found["factor"] == 4


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        (
            {"rope.scaling.type": "spiral"},
            {},
            "rope.scaling.type is 'spiral'; known are none, linear, yarn and longrope",
        ),
        ({"rope.scaling.type": "longrope"}, {}, "it holds only one or none"),
        ({}, {"rope_factors_long.weight": FACTORS}, "it holds only one or none"),
        (YARN, FREQS, "rope_freqs.weight comes with another scaling"),
        ({}, {"rope_freqs.weight": FACTORS[1:]}, r"has shape \[15\]; 16 positive numbers are needed"),
        ({}, {"rope_freqs.weight": 0 * FACTORS}, "16 positive numbers are needed"),
        ({"rope.dimension_count": 16}, {}, "rope.dimension_count is 16 of the 32 dimensions of a head"),
    ],
)
def test_what_has_no_equal_is_refused(keys: dict[str, Any], tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        rope_parameters({**KEYS, **keys}, tensors, HEAD, CONTEXT, partial=False)

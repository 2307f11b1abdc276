"""Rotary embeddings that depend on the length of a row: what a row alone is in transformers, cached and whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.runtime.pipeline import Pipeline

LIMIT = 24
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0],
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "longrope": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **SIZES, max_position_embeddings=96, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE
        )
    ),
    "dynamic": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES,
            max_position_embeddings=LIMIT,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        )
    ),
    "phimoe": lambda: transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(
            **SIZES,
            max_position_embeddings=96,
            num_local_experts=4,
            rope_parameters={**LONGROPE, "long_mscale": 1.5, "short_mscale": 1.1},
        )
    ),
}


def exported(name: str, folder: Path) -> tuple[Any, Path]:
    """A bfloat16 checkpoint whose every token depends on the positions of all others, exported; and a function that
    loads it into transformers, in float32 and without what an earlier call left."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    bundle = export(folder / "checkpoint", folder / "bundle", stages=2)
    assert bundle.manifest.cached, bundle.manifest.no_cache_reason
    assert bundle.manifest.max_positions == 96

    def fresh() -> Any:
        return (
            type(model).from_pretrained(folder / "checkpoint", dtype=torch.float32, attn_implementation="eager").eval()
        )

    return fresh, bundle.path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_computed_and_continued_as_transformers_does_each_alone(name: str, tmp_path: Path) -> None:
    fresh, bundle = exported(name, tmp_path)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 99, length) for length in (1, LIMIT - 4, LIMIT, LIMIT + 1, 60)]
    prompts += [np.append(prompts[-1][: LIMIT - 3], 5), prompts[-1][:50]]  # which begin as a longer row does
    ids, mask = np.zeros((2, len(prompts), 60), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    with Pipeline.open(bundle, slots=3, prefill_chunk=7) as pipeline:
        logits = pipeline.run({"input_ids": ids, "attention_mask": mask})["logits"]
        generations = [pipeline.generate(prompt.tolist(), max_tokens=8) for prompt in prompts]
        drawn = [generation.result(60).choices[0].token_ids for generation in generations]
    for row, prompt in enumerate(prompts):
        alone = {
            "input_ids": torch.tensor(prompt)[None],
            "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
        }
        with torch.no_grad():
            want = fresh()(**alone).logits[0]
            tokens = fresh().generate(**alone, do_sample=False, max_new_tokens=8)[0, len(prompt) :]
        np.testing.assert_allclose(logits[row, : len(prompt)], want, atol=1e-4)
        assert list(drawn[row]) == tokens.tolist()

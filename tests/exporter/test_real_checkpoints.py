"""The two real checkpoints, cut every way, against torch; and what they say makes sense."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
import transformers
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.pipeline import Pipeline

CHECKPOINTS = Path(__file__).parents[2] / "models/checkpoints"
TEXTS = [
    "The capital of France is",
    "A man is eating pasta.",
    "def add(a, b):\n    return a + b",
    "Der schnelle braune Fuchs springt über den faulen Hund, während die Sonne langsam hinter den Bergen versinkt.",
    "x",
]
pytestmark = [pytest.mark.slow, pytest.mark.checkpoints]


@pytest.fixture(scope="module")
def bundles(link_reference_bundle: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("minilm", "smollm2"):
        link_reference_bundle(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def smollm2_logits(bundles: Path) -> np.ndarray:
    """torch's logits in float64, the judge: its own float32 logits differ from them by as much as ours do."""
    with patch.object(gguf, "GGUFReader", lru_cache(gguf.GGUFReader)):  # seconds, and transformers does it three times
        model = transformers.AutoModelForCausalLM.from_pretrained(
            CHECKPOINTS / "smollm2",
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            attn_implementation="eager",
            dtype=torch.float32,
        )
    with torch.no_grad():
        return np.asarray(model.double().eval()(**tensors(encoded(Bundle.open(bundles / "smollm2")))).logits)


def encoded(bundle: Bundle) -> dict[str, np.ndarray]:
    text = bundle.manifest.text
    assert text is not None
    inputs = TextEncoder.open(bundle.path / text.tokenizer, text.max_length, text.pad_id).encode(TEXTS)
    wanted = {spec.name for spec in Signature.of(bundle.manifest).inputs}
    return {name: value for name, value in inputs.items() if name in wanted}


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


@pytest.mark.parametrize("stages", [1, 2, 6])
def test_minilm_gives_the_embeddings_of_torch(bundles: Path, stages: int) -> None:
    bundle = recut(bundles / "minilm", stages)
    inputs = encoded(bundle)
    with Pipeline.open(bundle.path) as pipeline:
        got = pipeline.run(inputs)
    model = transformers.AutoModel.from_pretrained(CHECKPOINTS / "minilm", attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(**tensors(inputs)).last_hidden_state.numpy()
    mask = inputs["attention_mask"]
    want = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert np.abs(got["last_hidden_state"] - hidden)[mask == 1].max() <= 1e-4
    assert np.abs(got["sentence_embedding"] - want).max() <= 1e-6


@pytest.mark.parametrize("stages", [1, 2, 30])
def test_smollm2_gives_the_logits_of_torch_in_float64(bundles: Path, smollm2_logits: np.ndarray, stages: int) -> None:
    bundle = recut(bundles / "smollm2", stages)
    inputs = encoded(bundle)
    with Pipeline.open(bundle.path, quantise=bundle.manifest.exact) as pipeline:
        got = pipeline.run(inputs)["logits"]
    real = inputs["attention_mask"] == 1
    assert np.abs(got - smollm2_logits)[real].max() <= 1e-4
    text = bundle.manifest.text
    assert text is not None
    last = int(got[0, inputs["attention_mask"][0].sum() - 1].argmax())
    assert TextEncoder.open(bundle.path / text.tokenizer, text.max_length, text.pad_id).decode([last]) == " Paris"

"""A quantised checkpoint from the file through the cut to the engines: what lies on disk, and what it computes."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.models.errors import BundleError
from stageline.models.tensors import PackedEntry
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines import WeightDtype
from stageline.runtime.pipeline import Pipeline
from tiny_gguf import VOCABULARY, write_gguf

IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 11))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in Q4_1, whose queries and keys llama.cpp has in another order of rows, and whose head is its table."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    file = tmp_path_factory.mktemp("checkpoint") / "model.gguf"
    return write_gguf(file, model, "llama", kind=gguf.GGMLQuantizationType.Q4_1)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", stages=2).path


def logits(bundle: Path, engine: str = "onnxruntime", quantise: WeightDtype | None = None) -> np.ndarray:
    with Pipeline.open(bundle, engine=engine, quantise=quantise) as pipeline:
        return np.asarray(pipeline.run({"input_ids": IDS})["logits"])


def test_it_is_as_small_as_the_file_and_computes_what_transformers_does(bundle: Path, checkpoint: Path) -> None:
    opened = Bundle.open(bundle)
    matrices = [entry for entry in opened.weights.values() if len(entry.shape) == 2]
    assert all(isinstance(entry, PackedEntry) for entry in matrices)
    held = sum(file.stat().st_size for file in (bundle / "weights").iterdir())
    assert held <= 1.1 * checkpoint.stat().st_size
    assert opened.weight_bytes < opened.parameters  # 5 bits a weight
    assert opened.manifest.version == 5
    assert "largest difference to transformers" in (opened.manifest.checked or "")


@pytest.mark.parametrize(("engine", "most"), [("onnxruntime", 3e-2), ("openvino", 1e-5)])
def test_engines_keep_the_weights(engine: str, most: float, bundle: Path) -> None:
    want, got = logits(bundle, quantise="float32"), logits(bundle, engine)
    assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < most


def test_it_is_cut_again(bundle: Path, tmp_path: Path) -> None:
    want = logits(bundle, quantise="float32")
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert len(recut(copy, 3).manifest.stages) == 3
    np.testing.assert_allclose(logits(copy, quantise="float32"), want, atol=1e-5)


def test_running_stages_change_their_cut_and_their_weights(bundle: Path) -> None:
    with Pipeline.open(bundle, quantise="float32", slots=2) as pipeline:
        want = pipeline.run({"input_ids": IDS})["logits"]
        pipeline.recut(1)
        np.testing.assert_allclose(pipeline.run({"input_ids": IDS})["logits"], want, atol=1e-5)
        pipeline.swap_weights(bundle)
        np.testing.assert_allclose(pipeline.run({"input_ids": IDS})["logits"], want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "gtpq"}, "the method 'gtpq' is unknown, known are "),
        ({"shape": [64, 128]}, "its blocks is uint8"),
        ({"settings": {"type": "Q8_0"}}, "its blocks is uint8"),
        ({"parts": {"blocks": "elsewhere"}}, "no weight file holds tensor 'elsewhere'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(
    change: dict[str, object], said: str, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    name = "blk.0.attn_q.weight"
    manifest["packed"][name] |= change
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as refused:
        Bundle.open(copy)
    assert name in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)

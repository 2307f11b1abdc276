"""Quantising at export: which weights become what, what the bundle computes, and what is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from llamas import TIED
from stageline.exporter.export import export
from stageline.exporter.quantise.choice import Quantisation, schemes
from stageline.exporter.quantise.nearest import Scheme
from stageline.exporter.quantise.streaming import quantised
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.against_torch import verify
from stageline.models.errors import ExportError
from stageline.models.tensors import PackedEntry
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.pipeline import Pipeline
from tiny_gguf import VOCABULARY, write_gguf

IDS = np.random.default_rng(0).integers(3, 300, (2, 11))
INT4 = Quantisation("int4", 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tied"
    synthesize(TIED, folder, seed=1, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", quantise=INT4).path


def logits(bundle: Path, engine: str, quantise: str | None = None) -> np.ndarray:
    with Pipeline.open(bundle, engine=engine, quantise=quantise) as pipeline:  # type: ignore[arg-type]
        return np.asarray(pipeline.run({"input_ids": IDS})["logits"])


def test_matrices_have_four_bits_and_the_table_eight(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    bits = {n: e.packing.settings["bits"] for n, e in opened.weights.items() if isinstance(e, PackedEntry)}
    assert len(bits) == 2 * 7 + 1  # the head is the table
    assert bits.pop("model.embed_tokens.weight") == 8
    assert set(bits.values()) == {4}
    assert {e.dtype for e in opened.weights.values() if not isinstance(e, PackedEntry)} == {"bfloat16"}
    held = sum(file.stat().st_size for file in (bundle / "weights").iterdir())
    assert held < 0.75 * opened.parameters  # 4.4 bits of most


def test_it_computes_what_transformers_does_with_these_numbers(bundle: Path, checkpoint: Path) -> None:
    assert "largest difference to transformers" in (Bundle.open(bundle).manifest.checked or "")
    assert verify(bundle, checkpoint, seed=0).passed


@pytest.mark.parametrize(("engine", "most"), [("onnxruntime", 3e-2), ("openvino", 2e-3)])
def test_engines_keep_the_numbers(engine: str, most: float, bundle: Path) -> None:
    want, got = logits(bundle, "onnxruntime", "float32"), logits(bundle, engine)
    assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < most


def test_a_quantised_file_is_refused_and_unpacked_on_demand(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    file = write_gguf(tmp_path / "model.gguf", model, "llama", kind=gguf.GGMLQuantizationType.Q4_1)
    with pytest.raises(ExportError, match=r"quantised already \(.*: Q4_1\).*--dtype float32"):
        export(file, tmp_path / "bundle", quantise=INT4)
    assert not (tmp_path / "bundle").exists()
    opened = export(file, tmp_path / "bundle", dtype="float32", quantise=Quantisation("int8", 32))
    packed = [entry for entry in opened.weights.values() if isinstance(entry, PackedEntry)]
    assert {entry.packing.method for entry in packed} == {"compressed-tensors"}
    assert "largest difference to transformers" in (opened.manifest.checked or "")


def test_a_model_without_large_matrices_is_refused(tmp_path: Path) -> None:
    synthesize(
        {**TIED, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 99},
        tmp_path / "small",
        seed=1,
        dtype="bfloat16",
    )
    with pytest.raises(ExportError, match=r"has no matrix to quantise .*; leave out --quantise"):
        export(tmp_path / "small", tmp_path / "bundle", quantise=INT4)


def test_values_that_are_not_finite_are_refused() -> None:
    weight = np.ones((128, 128), np.float32)
    weight[3, 5] = np.inf
    _, data, _ = quantised({"w": Scheme(4, 32)}, [("w", "float32", (128, 128))], lambda name: [weight.tobytes()])
    with pytest.raises(ExportError, match=r"^w holds values that are infinite or no number"):
        list(data("wweight_scale"))


@pytest.mark.parametrize(("columns", "wanted", "group"), [(576, 128, 64), (512, 128, 128), (48 * 9, 64, 16)])
def test_a_group_is_halved_until_it_divides(columns: int, wanted: int, group: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(columns, 512), torch.nn.Linear(500, 512))
    names = {name: name for name, _ in model.named_parameters()}
    assert schemes(model, names, Quantisation("int4", wanted)) == {"0.weight": Scheme(4, group)}

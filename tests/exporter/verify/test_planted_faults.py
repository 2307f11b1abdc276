"""verify finds a tied head that should not be tied, and every scale that is dropped, in bundles that exported fine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.against_torch import verify
from stageline.models.tensors import TensorEntry
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.bundle.recut import recut

EMBEDDING, RESIDUAL, LOGITS, ATTENTION, YARN = 3.0, 0.375, 5.0, 0.625, 1.75
GRANITE: dict[str, Any] = {
    "model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 40, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "embedding_multiplier": EMBEDDING,
    "residual_multiplier": RESIDUAL, "logits_scaling": LOGITS, "attention_multiplier": ATTENTION,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": YARN,
                        "original_max_position_embeddings": 16},
}  # fmt: skip
Sides = tuple[Path, Path]


@pytest.fixture(scope="module")
def exported(made_once: Callable[..., Path]) -> Sides:
    """A checkpoint in bfloat16 with a scale of each kind, and its bundle; do not change them."""

    def make(folder: Path) -> None:
        synthesize(GRANITE, folder, seed=3, dtype="bfloat16")
        tensors = load_file(folder / "model.safetensors")  # larger weights, so that attention looks at something
        larger = {name: tensor * (1 if "norm" in name else 8) for name, tensor in tensors.items()}
        save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})

    source = made_once("granite-from", make)
    return source, made_once("granite", lambda folder: export(source, folder))


@pytest.fixture
def copied(exported: Sides, tmp_path: Path) -> Sides:
    """The checkpoint, and a bundle to plant a fault in."""
    source, bundle = exported
    return source, Path(shutil.copytree(bundle, tmp_path / "b"))


def passes(sides: Sides) -> bool:
    return verify(sides[1], sides[0], seed=7).passed


def rewritten(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with the digests of the files that lie there, and the stages that follow from its parts."""
    files = tuple(file_entry(folder, entry.path) for entry in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    recut(folder, 1)


def test_nothing_is_found_where_nothing_is_planted(copied: Sides) -> None:
    rewritten(copied[1], Bundle.open(copied[1]).manifest)
    assert passes(copied)


def test_a_head_that_was_tied_is_found(copied: Sides) -> None:
    """The checkpoint holds another head than its embeddings, which the bundle takes for both."""
    manifest = Bundle.open(copied[1]).manifest
    last = manifest.uses[-1]
    assert "lm_head.weight" in last.weights.values()
    tied = {
        name: "model.embed_tokens.weight" if tensor == "lm_head.weight" else tensor
        for name, tensor in last.weights.items()
    }
    uses = (*manifest.uses[:-1], last.model_copy(update={"weights": tied}))
    rewritten(copied[1], manifest.model_copy(update={"uses": uses}))
    assert not passes(copied)


def test_weights_without_their_scale_are_found(copied: Sides) -> None:
    """As int8 weights are that were cast and not multiplied by their scales."""
    bundle = Bundle.open(copied[1])
    entry = bundle.tensors["model.layers.1.self_attn.o_proj.weight"]
    assert isinstance(entry, TensorEntry)
    values = np.memmap(entry.file, ml_dtypes.bfloat16, "r+", entry.offset, entry.shape)
    values[:] = (values.astype(np.float32) * 127).astype(ml_dtypes.bfloat16)
    values.flush()
    rewritten(copied[1], bundle.manifest)
    assert not passes(copied)


@pytest.mark.parametrize("scale", [EMBEDDING, RESIDUAL, LOGITS, YARN])
def test_a_constant_that_became_one_is_found(copied: Sides, scale: float) -> None:
    """What multiplies embeddings, residuals, logits, and cosine and sine of the rotary positions."""
    changed = 0
    manifest = Bundle.open(copied[1]).manifest
    for part in manifest.parts:
        model = ir.load(copied[1] / part.file)
        for value in [v for node in model.graph for v in node.inputs if v is not None and v.const_value is not None]:
            array = value.const_value.numpy()
            if array.ndim == 0 and array.dtype.kind not in "biu" and float(array) in (scale, 1 / scale):
                value.const_value = ir.tensor(np.ones_like(array), dtype=value.dtype)
                changed += 1
        ir.save(model, copied[1] / part.file)
    assert changed
    rewritten(copied[1], manifest)
    assert not passes(copied)


def test_another_scale_of_attention_is_found(copied: Sides) -> None:
    manifest = Bundle.open(copied[1]).manifest
    for part in manifest.parts:
        model = ir.load(copied[1] / part.file)
        for node in model.graph:
            if "scale" in node.attributes:
                assert node.attributes["scale"].as_float() == ATTENTION
                node.attributes["scale"] = ir.AttrFloat32("scale", 8**-0.5)
        ir.save(model, copied[1] / part.file)
    rewritten(copied[1], manifest)
    assert not passes(copied)

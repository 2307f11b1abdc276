"""What an export makes: proven stamping or an honest full trace, placed or converted weights, cuts that ship little."""

import filecmp
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from stageline.exporter import skeleton, tasks
from stageline.exporter.export import export
from stageline.models.errors import BundleError, ExportError
from stageline.models.synthetic import write_random, write_sparse
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Refusal
from stageline.runtime.bundle.recut import recut
from stageline.runtime.pipeline import Pipeline

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 99,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def checkpoint(
    folder: Path, model_type: str, saved_as: str, dtype: str = "float32", sparse: bool = False, **more: Any
) -> Path:
    values = {**TINY, "model_type": model_type, "architectures": [saved_as], **more}
    config = skeleton.config_of(values)
    model = skeleton.build(config, tasks.task_of(config, None), getattr(torch, dtype), "eager")
    shapes = skeleton.parameter_shapes(model)
    if sparse:
        write_sparse(folder, values, shapes)
    else:
        write_random(folder, values, shapes, seed=3)
    return folder


def torch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return np.asarray(model.eval()(input_ids=torch.from_numpy(ids)).logits)


def logits(bundle: Path, ids: np.ndarray) -> np.ndarray:
    with Pipeline.open(bundle) as pipeline:
        return pipeline.run({"input_ids": ids})["logits"]


@pytest.mark.slow
def test_a_graph_that_depends_on_the_block_index_is_traced_in_full(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", "gpt2", "GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=4, n_positions=64,
                        scale_attn_by_inverse_layer_idx=True)  # fmt: skip
    bundle = export(source, tmp_path / "b", stages=2)
    assert bundle.manifest.trace.startswith("full: all 4 blocks traced")
    ids = np.random.default_rng(0).integers(3, 99, (2, 9))
    assert np.abs(logits(tmp_path / "b", ids) - torch_logits(source, ids)).max() <= 1e-4


@pytest.mark.slow
def test_stamped_and_full_traces_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "c", "llama", "LlamaForCausalLM", num_key_value_heads=2)
    export(source, tmp_path / "stamped", stages=2)
    monkeypatch.setattr("stageline.exporter.trace_model.stampable", lambda stack: "asked by the test")
    assert export(source, tmp_path / "full", stages=2).manifest.trace.startswith("full")
    ids = np.random.default_rng(1).integers(3, 99, (3, 11))
    assert np.array_equal(logits(tmp_path / "stamped", ids), logits(tmp_path / "full", ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "asked", "same", "tolerance"),
    [("bfloat16", None, True, 1e-4), ("bfloat16", "float32", False, 1e-4), ("float32", "float16", False, 5e-3)],
)
def test_weights_are_placed_where_right_and_converted_where_asked(
    tmp_path: Path, stored: str, asked: Any, same: bool, tolerance: float
) -> None:
    source = checkpoint(tmp_path / "c", "llama", "LlamaForCausalLM", stored, num_key_value_heads=2)
    bundle = export(source, tmp_path / "b", stages=2, dtype=asked)
    assert bundle.manifest.dtype == (asked or stored)
    weights = tmp_path / "b/weights/model.safetensors"
    assert filecmp.cmp(source / "model.safetensors", weights, shallow=False) == same
    for stage in bundle.manifest.stages:  # onnx itself reads a fresh bundle
        onnx.checker.check_model(bundle.path / stage.file)
        assert all(tensor.raw_data for tensor in onnx.load(bundle.path / stage.file).graph.initializer)
    ids = np.random.default_rng(2).integers(3, 99, (2, 7))
    assert np.abs(logits(tmp_path / "b", ids) - torch_logits(source, ids)).max() <= tolerance


@pytest.mark.slow
def test_export_reads_no_weights_of_a_large_checkpoint_and_guards_its_header(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", "llama", "LlamaForCausalLM", "bfloat16", sparse=True,
                        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                        num_hidden_layers=16)  # fmt: skip
    bundle = export(source, tmp_path / "b", stages=4)
    entry = next(file for file in bundle.manifest.files if file.path in bundle.manifest.weight_files)
    assert entry.size_bytes > 2 * 1024**3
    assert entry.sha256 is None
    assert bundle.manifest.notes[0] == (
        f"{entry.size_bytes / 1e9:.1f} GB of weights are hard links to the checkpoint's files, which onnx.load and "
        "onnx.checker refuse; let them open a copy of the bundle (cp -r)"
    )
    assert (tmp_path / "c/model.safetensors").stat().st_blocks * 512 < 1024**2  # still a hole: nothing was written
    assert sum(s.weight_bytes for s in bundle.manifest.stages) == pytest.approx(entry.size_bytes, rel=0.01)

    Bundle.open(bundle.path)
    file = bundle.path / entry.path  # too large to hash, it is guarded by its header
    with file.open("rb") as opened:
        size = opened.read(8)
        data = bytearray(size + opened.read(int.from_bytes(size, "little")))
    data[20] ^= 1
    file.unlink()
    file.write_bytes(data)
    os.truncate(file, entry.size_bytes)
    with pytest.raises(BundleError, match="header"):
        Bundle.open(bundle.path)


@pytest.mark.slow
def test_masks_are_recomputed_and_not_shipped(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", "mistral", "MistralForCausalLM", num_key_value_heads=2, sliding_window=6)
    bundle = export(source, tmp_path / "b", stages=3)
    for stage in bundle.manifest.stages[1:]:
        assert all(spec.shape.count("length") <= 1 for spec in stage.inputs), stage.inputs
    assert recut(tmp_path / "b", [2, 1, 1]).manifest.stages[0].last_block == 1
    assert Bundle.open(tmp_path / "b").manifest.stages[2].first_block == 3


@pytest.mark.parametrize("function", ["trace_model.kinds", "attention.watch"])
def test_a_key_error_of_our_own_is_a_bug_and_keeps_its_traceback(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "c", "llama", "LlamaForCausalLM", num_key_value_heads=2)
    empty: dict[str, Any] = {}
    monkeypatch.setattr(f"stageline.exporter.{function}", lambda *given: empty["mistake"])
    with pytest.raises(KeyError, match="mistake"):
        export(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_attention_that_transformers_lacks_is_refused_with_the_reason(tmp_path: Path) -> None:
    """data2vec looks its attention up in a table of its own."""
    source = checkpoint(tmp_path / "c", "data2vec-vision", "Data2VecVisionForImageClassification",
                        image_size=32, patch_size=16, num_hidden_layers=2)  # fmt: skip
    manifest = export(source, tmp_path / "b").manifest
    assert manifest.attention == "primitive"
    assert manifest.refused == (Refusal(attention="fused", reason="it computes attention itself"),)


def test_a_task_the_checkpoint_was_not_saved_for_names_the_missing_tensor(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", "bert", "BertModel")
    with pytest.raises(ExportError, match=r"lacks \d tensors \(cls\.predictions\.decoder\.bias, "):
        export(source, tmp_path / "b", task="fill-mask")
    assert not (tmp_path / "b").exists()

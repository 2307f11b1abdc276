"""The verifier finds agreement where it is, and each error in the stage that makes it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify.against_torch import verify
from stageline.exporter.verify.random_inputs import random_inputs
from stageline.models.errors import ExportError
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.bundle.recut import recut

CHECKPOINTS = Path(__file__).parents[3] / "models/checkpoints"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_every_stage_and_the_whole_are_compared(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    done = verify(tiny_bundle, tiny_checkpoint, seed=1)
    assert [(c.stage, c.value) for c in done.comparisons] == [(0, "hidden.2"), (1, "logits"), (None, "logits")]
    assert done.passed
    assert all(0 <= c.mean_error <= c.max_error < 1e-5 for c in done.comparisons)
    assert done.lengths[:2] == (16, 1)


def test_inputs_differ_by_seed_and_pad_ragged_rows(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    one, two = random_inputs(manifest, 1), random_inputs(manifest, 2)
    assert not np.array_equal(one["input_ids"], two["input_ids"])
    assert ((one["input_ids"] == 0) == (one["attention_mask"] == 0)).all()
    assert one["input_ids"].max() < 12


@pytest.mark.parametrize("broken", [0, 1])
def test_a_wrong_stage_is_named(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, broken: int) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "b"))
    double_output(bundle, broken)
    failed = [(c.stage, c.value) for c in verify(tmp_path / "b", tiny_checkpoint, seed=1).comparisons if not c.passed]
    assert failed[0] == (broken, "hidden.2" if broken == 0 else "logits")
    assert all(stage in (broken, None) for stage, _ in failed)


def double_output(bundle: Bundle, number: int) -> None:
    """Make the stage give twice what it should, and the manifest agree with that graph."""
    manifest = bundle.manifest
    file = manifest.stages[number].file
    model = ir.load(bundle.path / file)
    output = next(v for v in model.graph.outputs if v.name in ("hidden.2", "logits"))
    last = output.producer()
    assert last is not None
    assert output.dtype is not None
    number = ir.tensor(np.array(2, output.dtype.numpy()), name="two")
    two = ir.Value(name="two", const_value=number, type=output.type, shape=ir.Shape([]))
    model.graph.register_initializer(two)
    renamed = ir.node("Mul", [output, two])
    renamed.outputs[0].name, output.name = str(output.name), "half"
    renamed.outputs[0].type, renamed.outputs[0].shape = output.type, output.shape
    model.graph.outputs[list(model.graph.outputs).index(output)] = renamed.outputs[0]
    model.graph.append(renamed)
    ir.save(model, bundle.path / file)
    files = [file_entry(bundle.path, file) if entry.path == file else entry for entry in manifest.files]
    write_manifest(bundle.path, manifest.model_copy(update={"files": tuple(files)}))


def test_other_weights_do_not_pass(tiny_bundle: Path, tmp_path: Path) -> None:
    from stageline.models.json_file import read_json_object

    copy = read_json_object(tiny_bundle / "tokenizer/config.json")
    synthesize(copy, tmp_path / "other", seed=6, dtype="bfloat16")
    assert not verify(tiny_bundle, tmp_path / "other", seed=1).passed


def test_a_checkpoint_of_another_architecture_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    synthesize(LLAMA, tmp_path / "other", seed=1, dtype="bfloat16")
    with pytest.raises(ExportError, match=r"is a llama, the bundle was made from a bert; give the checkpoint"):
        verify(tiny_bundle, tmp_path / "other", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_dtype_passes_at_its_tolerance(tmp_path: Path, dtype: Any) -> None:
    synthesize(LLAMA, tmp_path / "c", seed=1, dtype="float32")
    export(tmp_path / "c", tmp_path / "b", stages=3, dtype=dtype)
    done = verify(tmp_path / "b", tmp_path / "c", seed=2)
    assert done.dtype == dtype
    assert [c.value for c in done.comparisons] == ["hidden.1", "hidden.2", "logits", "logits"]
    assert done.passed, done.comparisons


@pytest.mark.slow
@pytest.mark.checkpoints
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_the_real_checkpoints_pass_at_one_block_a_stage(
    name: str, link_reference_bundle: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    bundle = link_reference_bundle(name, tmp_path / "b")
    recut(bundle, Bundle.open(bundle).manifest.blocks)
    done = verify(bundle, CHECKPOINTS / name, seed=3)
    assert done.passed, [c for c in done.comparisons if not c.passed]

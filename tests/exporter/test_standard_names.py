"""Weights under any name: transformers loads those that were opened, and an export has their values."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.exporter.standard_names import folder_for_transformers
from stageline.exporter.verify.against_torch import verify
from stageline.models.checkpoint import Checkpoint
from stageline.models.safetensors_file import read_header


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in bfloat16 in two shards without an index, and beside it another model's weights."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from safetensors.torch import save_file

    save_file({name: tensor * 3 for name, tensor in state.items()}, tmp_path / "c" / "model.other.safetensors")
    for number in (0, 1):
        part = {name: tensor for i, (name, tensor) in enumerate(state.items()) if i % 2 == number}
        save_file(part, tmp_path / "c" / f"model.bf16-0000{number + 1}-of-00002.safetensors")
    return tmp_path / "c"


def test_transformers_loads_the_files_that_were_opened(folder: Path) -> None:
    sums = {}
    for name in ("model.bf16-00001-of-00002.safetensors", "model.other.safetensors"):
        with folder_for_transformers(Checkpoint.open(folder / name)) as names:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(names, dtype=torch.float32)
            sums[name] = sum(float(p.detach().abs().sum()) for p in model.parameters())
    ours, others = sums.values()
    assert others / ours == pytest.approx(3, rel=0.01)


def test_a_folder_that_transformers_reads_as_we_do_is_given_as_it_is(tiny_checkpoint: Path) -> None:
    with folder_for_transformers(Checkpoint.open(tiny_checkpoint)) as names:
        assert names == tiny_checkpoint


@pytest.mark.slow
def test_shards_of_one_name_in_two_folders_are_both_placed(folder: Path, tmp_path: Path) -> None:
    weight_map = {}
    for number in (1, 2):
        shard = folder / f"part{number}" / "model.safetensors"
        shard.parent.mkdir()
        (folder / f"model.bf16-0000{number}-of-00002.safetensors").rename(shard)
        weight_map |= dict.fromkeys(read_header(shard), f"part{number}/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(export(folder, tmp_path / "b").manifest.weight_files) == 2
    assert verify(tmp_path / "b", folder, seed=4).passed


@pytest.mark.slow
def test_shards_without_an_index_export_and_verify(folder: Path, tmp_path: Path) -> None:
    chosen = folder / "model.bf16-00002-of-00002.safetensors"
    bundle = export(chosen, tmp_path / "b")
    assert sorted(Path(name).name for name in bundle.manifest.weight_files) == [
        "model.bf16-00001-of-00002.safetensors",
        "model.bf16-00002-of-00002.safetensors",
    ]
    assert verify(tmp_path / "b", chosen, seed=3).passed
    errors = verify(tmp_path / "b", folder / "model.other.safetensors", seed=3)
    assert not errors.passed
    assert all(np.isfinite(c.max_error) for c in errors.comparisons)

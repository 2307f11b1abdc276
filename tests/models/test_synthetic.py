"""Made-up checkpoints: repeatable, in a useful range, and, when sparse, of any size."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError

TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "dense.weight": ("float32", (300, 200)),
    "dense.bias": ("float32", (3000,)),
    "norm.weight": ("float32", (3000,)),
}


def random_arrays(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int
) -> dict[str, NDArray[np.float32]]:
    synthetic.write_random(folder, {"model_type": "llama"}, tensors, seed)
    return load_file(folder / "model.safetensors")


def test_random_weights_have_the_spread_of_trained_ones(tmp_path: Path) -> None:
    arrays = random_arrays(tmp_path / "c", TENSORS, seed=1)
    assert arrays["dense.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert arrays["dense.bias"].std() == pytest.approx(0.02, rel=0.1)
    assert arrays["norm.weight"].mean() == pytest.approx(1, rel=0.1)
    assert arrays["norm.weight"].std() == pytest.approx(0.1, rel=0.1)
    assert Checkpoint.open(tmp_path / "c").config == {"model_type": "llama"}


def test_values_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    first = random_arrays(tmp_path / "a", TENSORS, seed=1)
    alone = random_arrays(tmp_path / "b", {"dense.bias": TENSORS["dense.bias"]}, seed=1)
    other = random_arrays(tmp_path / "c", TENSORS, seed=2)
    np.testing.assert_array_equal(first["dense.bias"], alone["dense.bias"])
    assert not np.array_equal(first["dense.bias"], other["dense.bias"])
    assert not np.array_equal(first["dense.bias"][:10], first["dense.weight"].ravel()[:10])


def test_a_random_checkpoint_is_the_same_on_every_machine(tmp_path: Path) -> None:
    synthetic.write_random(tmp_path / "c", {}, {"a.weight": ("float32", (4, 4))}, seed=7)
    digest = hashlib.sha256((tmp_path / "c" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "2f154bd7c91c316d07d24c82e85990051812f499237712676c140b674d16d8c2"


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    wide = random_arrays(tmp_path / "a", {"x": ("float32", (50, 50))}, seed=3)["x"]
    synthetic.write_random(tmp_path / "b", {}, {"x": ("bfloat16", (50, 50))}, seed=3)
    entry = Checkpoint.open(tmp_path / "b").tensors["x"]
    narrow = np.fromfile(entry.file, ml_dtypes.bfloat16, offset=entry.offset).reshape(entry.shape)
    np.testing.assert_array_equal(narrow, wide.astype(ml_dtypes.bfloat16))


def test_random_integers_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'ids' has the dtype int64; random values are made for floating types"):
        synthetic.write_random(tmp_path / "c", {}, {"ids": ("int64", (4,))}, seed=1)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"exists already; delete it, or choose another place"):
        synthetic.write_sparse(tmp_path, {}, TENSORS)


def test_a_sparse_checkpoint_takes_no_disk(tmp_path: Path) -> None:
    synthetic.write_sparse(tmp_path / "c", {}, {"a": ("bfloat16", (100_000, 100_000))})
    status = (tmp_path / "c" / "model.safetensors").stat()
    assert status.st_size > 2 * 10**10
    assert status.st_blocks * 512 < 10**6
    assert Checkpoint.open(tmp_path / "c").tensors["a"].size_bytes == 2 * 10**10


def test_shards_stay_below_the_limit_or_hold_one_tensor(tmp_path: Path) -> None:
    tensors = {name: ("float32", (size,)) for name, size in [("a", 10), ("b", 10), ("c", 10), ("big", 100), ("d", 5)]}
    synthetic.write_sparse(tmp_path / "c", {}, tensors, shard_bytes=80)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 135
    assert {name: file[6:11] for name, file in index["weight_map"].items()} == {
        "a": "00001",
        "b": "00001",
        "c": "00002",
        "big": "00003",
        "d": "00004",
    }
    assert Checkpoint.open(tmp_path / "c").tensors.keys() == tensors.keys()

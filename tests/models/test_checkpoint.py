"""Opening a checkpoint: what is accepted, and what each refusal says."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError

CONFIG = {"model_type": "bert", "hidden_size": 4}


def folder_with(folder: Path, **files: Any) -> Path:
    """A folder with these files; `config` is config.json."""
    for name, content in files.items():
        file = folder / {"config": "config.json", "index": "model.safetensors.index.json"}[name]
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def shards(folder: Path, weight_map: dict[str, Any]) -> Path:
    return folder_with(folder, config=CONFIG, index={"weight_map": weight_map})


def test_a_folder_with_one_weights_file(tmp_path: Path) -> None:
    folder_with(tmp_path, config=CONFIG)
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.kind, checkpoint.config, checkpoint.path) == ("safetensors", CONFIG, tmp_path)
    assert checkpoint.tensors["a"].shape == (2, 3)
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert checkpoint.tokenizer == tmp_path / "tokenizer.json"
    assert [file.name for file in checkpoint.auxiliary] == ["config.json", "tokenizer.json", "chat_template.jinja"]


def test_a_folder_with_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.zeros(3, np.int64)}, tmp_path / "two.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert checkpoint.tensors["b"].file == tmp_path / "two.safetensors"
    assert checkpoint.tokenizer is None


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "blob")
    (folder / "one.safetensors").symlink_to(tmp_path / "blob")
    assert "a" in Checkpoint.open(shards(folder, {"a": "one.safetensors"})).tensors


def test_a_sparse_checkpoint_of_70_billion_parameters_opens_at_once(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{j}": ("bfloat16", (8192, 10_752)) for i in range(80) for j in range(10)}
    synthetic.write_sparse(tmp_path / "big", CONFIG, tensors, shard_bytes=5 * 10**9)
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(tmp_path / "big")
    assert time.perf_counter() - begin < 0.5
    assert sum(entry.size_bytes for entry in checkpoint.tensors.values()) == 2 * 8192 * 10_752 * 800
    assert len(checkpoint.files) > 20


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give a checkpoint's folder or a .gguf file"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_path_the_system_refuses_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot look into .*: File name too long"):
        Checkpoint.open(tmp_path / ("x" * 300))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a .gguf or .safetensors file"):
        Checkpoint.open(tmp_path / "model.onnx")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither config.json nor a .gguf file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "config.json is not JSON"), ("[1]", "config.json holds a list, an object is needed")],
)
def test_a_broken_config_is_refused(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder_with(tmp_path, config=config))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("README.md", r"has no weights \(model.safetensors or model.safetensors.index.json\); download them"),
        (
            "pytorch_model.bin",
            "only in pytorch_model.bin, and reading a pickle can run any code; convert it",
        ),
        ("model.ckpt", "only in model.ckpt, and reading a pickle can run any code"),
        ("adapter_config.json", "holds an adapter, not a whole model; merge it"),
        (
            "model-00001-of-00002.safetensors",
            "lacks 1 of 2 shards, such as 'model-00002-of-00002.safetensors'; download them",
        ),
        ("model.Q4_0.gguf", "has its weights in model.Q4_0.gguf; give that file's path"),
    ],
)
def test_without_weights_the_folder_is_reported_what_it_has(tmp_path: Path, name: str, message: str) -> None:
    folder_with(tmp_path, config=CONFIG)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["../other/one.safetensors", "/etc/passwd", "a/../../b", 7])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    with pytest.raises(CheckpointError, match=r"outside the folder; do not trust this checkpoint"):
        Checkpoint.open(shards(tmp_path, {"a": shard}))


def test_a_missing_shard_is_named_with_what_it_holds(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks the shard 'two.safetensors', which holds 2 of the 3 tensors"):
        Checkpoint.open(tmp_path)


def test_a_shard_without_its_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"one.safetensors lacks tensor 'b'"):
        Checkpoint.open(shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"}))


def test_a_tensor_that_the_index_leaves_out_is_read(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}, tmp_path / "one.safetensors")
    assert set(Checkpoint.open(shards(tmp_path, {"a": "one.safetensors"})).tensors) == {"a", "b"}


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 1), ("three", 2)):
        save_file({"a": np.full(2, value, np.float32), name: np.zeros(1)}, tmp_path / f"{name}.safetensors")
    same = shards(tmp_path, {"a": "two.safetensors", "one": "one.safetensors"})
    assert Checkpoint.open(same).tensors["a"].shape == (2,)
    with pytest.raises(
        CheckpointError, match=r"'a' in one.safetensors and in three.safetensors, with different values"
    ):
        Checkpoint.open(shards(tmp_path, {"a": "one.safetensors", "three": "three.safetensors"}))


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weight_map"):
        Checkpoint.open(folder_with(tmp_path, config=CONFIG, index={"weight_map": []}))


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, config=CONFIG)
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(200, np.float32)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"but its header describes"):
        Checkpoint.open(tmp_path)


def test_of_several_gguf_files_one_must_be_chosen(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(struct.pack("<4s", b"GGUF"))
    with pytest.raises(CheckpointError, match=r"has 2 .gguf files \(a.gguf, b.gguf\); give one's path"):
        Checkpoint.open(tmp_path)

"""Which files are the weights: the names that transformers gives, any other if there is one model, and each refusal."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.weight_files import INDEX, SINGLE, WeightFiles, weight_files


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([SINGLE, INDEX, "consolidated.safetensors", "model.fp16.safetensors"], WeightFiles((SINGLE,))),
        ([INDEX, "consolidated.safetensors", "model-00001-of-00001.safetensors"], WeightFiles(index=INDEX)),
        (["pytorch_model.safetensors"], WeightFiles(("pytorch_model.safetensors",))),
        (["model.fp16.safetensors", "adapter_model.safetensors"], WeightFiles(("model.fp16.safetensors",))),
        (["model-00001-of-00001.safetensors"], WeightFiles(("model-00001-of-00001.safetensors",))),
        (["model.safetensors.index.fp16.json"], WeightFiles(index="model.safetensors.index.fp16.json")),
        (["diffusion.safetensors.index.json"], WeightFiles(index="diffusion.safetensors.index.json")),
        (["config.json", "tokenizer.json", "adapter_model.safetensors"], None),
    ],
)
def test_the_weights_among_these_names(names: list[str], chosen: WeightFiles | None) -> None:
    assert weight_files(names, "there") == chosen


@given(
    count=st.integers(1, 30),
    lost=st.integers(0, 29),
    before=st.sampled_from(["model", "model.fp16", "a-00001-of-00002"]),
    after=st.sampled_from(["", ".fp16"]),
)
def test_shards_without_an_index_are_all_there_or_one_is_named(count: int, lost: int, before: str, after: str) -> None:
    names = [f"{before}-{i:05}-of-{count:05}{after}.safetensors" for i in range(1, count + 1)]
    assert weight_files(reversed(names), "there") == WeightFiles(tuple(names))
    if lost < count and count > 1:
        missing = names.pop(lost)
        with pytest.raises(CheckpointError, match=re.escape(f"lacks 1 of {count} shards, such as {missing!r}")):
            weight_files(names, "there")


@pytest.mark.parametrize(
    "names",
    [
        ["model.fp16.safetensors", "model.fp32.safetensors"],
        ["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["a.safetensors.index.json", "b.safetensors.index.json", "a.safetensors", "b.safetensors"],
    ],
)
def test_of_several_models_one_is_to_be_chosen(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"^there has weights of several models or variants \(.*give one's"):
        weight_files(names, "there")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for number in (1, 2):
        save_file({f"t{number}": np.zeros(number, np.float16)}, tmp_path / f"m-0000{number}-of-00002.safetensors")
    save_file({"t1": np.zeros(1, np.float32), "t2": np.zeros(2, np.float32)}, tmp_path / "m.fp32.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "dtype"), [("m.fp32.safetensors", "float32"), ("m-00002-of-00002.safetensors", "float16")]
)
def test_a_file_opens_with_its_folder_and_the_rest_of_its_set(folder: Path, name: str, dtype: str) -> None:
    checkpoint = Checkpoint.open(folder / name)
    assert (checkpoint.path, checkpoint.config["model_type"]) == (folder, "bert")
    assert {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()} == {"t1": (dtype, (1,)), "t2": (dtype, (2,))}


def test_a_tensor_in_two_shards_that_no_index_places_is_refused(folder: Path) -> None:
    save_file({"t1": np.ones(1, np.float16)}, folder / "m-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"both hold tensor 't1', and no model\.safetensors\.index\.json says which"
    ):
        Checkpoint.open(folder / "m-00001-of-00002.safetensors")

"""Checkpoints of the Hugging Face Hub: what is downloaded, from a server or the cache, and what each failure says."""

import builtins
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_cache import put_into_cache
from hub_server import COMMIT, Hub, asked_by_huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.hub import Fetched, fetch
from stageline.models.hub_name import HubName


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks, with an empty cache of its own."""
    with asked_by_huggingface_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def repository(hub: Hub, folder: Path, *names: str, name: str = "org/model") -> Path:
    """Let the Hub have a model of a config and these files, .safetensors with a tensor each, others with their name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for number, file in enumerate(names):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".safetensors"):
            save_file({f"t{number}": np.full(3, number, np.float16)}, folder / file)
        else:
            (folder / file).write_text(file)
    hub.models[name] = folder
    return folder


def got(text: str) -> Fetched:
    name = HubName.parse(text)
    assert name is not None
    return fetch(name)


def refusal(text: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        got(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# What is downloaded


def test_small_files_and_the_weights_come_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    repository(
        hub, tmp_path / "r", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt", "modeling_own.py",
        "bpe.codes", "vocab.pkl",
        "model.onnx", "onnx/model.onnx", "1_Pooling/config.json", "2_Dense/model.safetensors", "README.md",
        "model.fp16.safetensors", "training_args.bin",
    )  # fmt: skip
    fetched = got("org/model")
    assert sorted(hub.downloads) == [
        "1_Pooling/config.json", "2_Dense/model.safetensors", "bpe.codes", "config.json", "model.safetensors",
        "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    assert (fetched.commit, fetched.is_bundle) == (COMMIT, False)
    assert fetched.path == tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT
    assert Checkpoint.open(fetched.path).tensors["t0"].shape == (3,)


def test_the_shards_of_the_index_come(hub: Hub, tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    folder = repository(hub, tmp_path / "r", *shards, "consolidated.safetensors")
    index = {"weight_map": {"t0": shards[0], "t1": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(got("org/model").path).tensors) == {"t0", "t1"}
    assert {name for name in hub.downloads if name.endswith(".safetensors")} == set(shards[:2])
    index["weight_map"]["t2"] = "gone.safetensors"
    shutil.rmtree(tmp_path / "cache")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "org/model lacks 'gone.safetensors', which its model.safetensors.index.json names" in refusal("org/model")


def test_a_second_time_nothing_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "model.safetensors")
    said: list[str] = []
    name = HubName("org/model")
    fetch(name, said.append)
    assert [line.split(",")[0] for line in said] == ["downloading 1 file of org/model"] * 2
    before, said[:] = len(hub.downloads), []
    fetch(name, said.append)
    assert (len(hub.downloads), said) == (before, [])


def test_of_several_gguf_files_one_is_to_be_named(hub: Hub, tmp_path: Path) -> None:
    names = ["a.Q4_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "mmproj-a.gguf"]
    repository(hub, tmp_path / "r", *names)
    assert refusal("org/model") == (
        "org/model has 2 .gguf models: a.Q4_0.gguf, b-00001-of-00002.gguf; choose one: org/model:a.Q4_0.gguf"
    )
    assert refusal("org/model:c.gguf").startswith("org/model has no weights in 'c.gguf'; it has a.Q4_0.gguf, b-00001")
    hub.downloads.clear()
    assert got("org/model:a.Q4_0.gguf").path.name == "a.Q4_0.gguf"
    assert got("org/model:b-00002-of-00002.gguf").path.name == "b-00001-of-00002.gguf"
    assert sorted(name for name in hub.downloads if name.endswith(".gguf")) == names[:3]


def test_a_single_gguf_file_needs_no_name(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "a.gguf")
    assert got(f"org/model@{COMMIT}").path.name == "a.gguf"


def test_of_several_variants_one_is_to_be_named(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "model.fp16.safetensors", "model.fp32.safetensors")
    assert "org/model has weights of several models or variants (model.fp16.safetensors, " in refusal("org/model")
    chosen = got("org/model:model.fp32.safetensors").path
    assert set(Checkpoint.open(chosen).tensors) == {"t1"}


def test_pickles_are_refused_before_they_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "pytorch_model.bin")
    assert "org/model has no weights in .safetensors or .gguf files (it has pytorch_model.bin); convert it" in refusal(
        "org/model"
    )
    assert hub.downloads == ["config.json"]


# The cache


def test_offline_the_cache_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository(hub, tmp_path / "r", "model.safetensors")
    snapshot = put_into_cache(folder, tmp_path / "cache", "org/model")
    offline(monkeypatch)
    assert got("org/model").path == got("org/model@main").path == got(f"org/model@{snapshot.name}").path == snapshot
    assert "there is no org/other here nor in" in refusal("org/other")
    assert refusal("org/other").endswith("to download it, unset HF_HUB_OFFLINE")
    assert "there is no org/model@v2 here" in refusal("org/model@v2")


def test_what_was_downloaded_opens_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, tmp_path / "r", "model.safetensors")
    online = got("org/model")
    offline(monkeypatch)
    assert got("org/model") == online


def test_without_a_network_the_cache_is_used_and_that_is_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = put_into_cache(repository(hub, tmp_path / "r", "model.safetensors"), tmp_path / "cache", "org/model")
    monkeypatch.setattr(constants, "ENDPOINT", _closed())
    said: list[str] = []
    assert fetch(HubName("org/model"), said.append).path == snapshot
    assert said[0].startswith("the Hub does not give org/model, so the cached one is used (")
    assert "cannot download org/other from http://127.0.0.1:" in refusal("org/other")


def _closed() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# Refusals


def test_a_name_that_the_hub_does_not_have(hub: Hub) -> None:
    assert refusal("org/none") == (
        f"there is no org/none here nor at {hub.endpoint}; if it is private there, log in with `hf auth login`, or set "
        "HF_TOKEN"
    )


def test_a_revision_that_it_does_not_have(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "model.safetensors")
    assert refusal("org/model@v9") == (f"org/model has no revision 'v9'; see {hub.endpoint}/org/model/commits/main")


def test_a_gated_model_needs_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, tmp_path / "r", "model.safetensors")
    hub.gated.add("org/model")
    assert f"org/model is gated: ask for access at {hub.endpoint}/org/model, then log in with" in refusal("org/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "answers 401 for org/model (" in refusal("org/model")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert Checkpoint.open(got("org/model").path).tensors


@pytest.mark.parametrize("status", [403, 429, 500])
def test_another_answer_is_shown(hub: Hub, status: int) -> None:
    hub.status = status
    assert f"{hub.endpoint} answers {status} for org/model (" in refusal("org/model")


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    repository(hub, tmp_path / "r", "model.safetensors")
    (tmp_path / "cache").write_text("a file")
    assert refusal("org/model").startswith(f"cannot write org/model into {tmp_path / 'cache'}: ")


def test_without_huggingface_hub_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError("No module named 'huggingface_hub'", name="huggingface_hub")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refusal("org/model") == (
        "there is no org/model here; if that is a name on the Hugging Face Hub: pip install 'stageline[hub]'"
    )


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("Org-1/na.me_2@v1.0", HubName("Org-1/na.me_2", "v1.0")),
        ("org/name@refs/pr/12:Q4/a.gguf", HubName("org/name", "refs/pr/12", "Q4/a.gguf")),
        ("org/name:model.fp16.safetensors", HubName("org/name", None, "model.fp16.safetensors")),
    ],
)
def test_these_are_names(text: str, name: HubName) -> None:
    assert HubName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "/a/b", "./a", "../b", "~/b", "a/b.gguf", "a//b", "a/b@", "a/b:", "a/b:/etc/passwd", "a/b:../c",
     "a--b/c", "a/..", "a/b c", "é/b", "a/b\n", ""],
)  # fmt: skip
def test_these_are_not(text: str) -> None:
    assert HubName.parse(text) is None


@given(st.text(alphabet="ab-._/@:~ é\n", max_size=20))
def test_what_is_a_name_is_one_for_huggingface_hub_too(text: str) -> None:
    name = HubName.parse(text)
    if name is not None:
        validate_repo_id(name.repository)
        assert str(name) == text
        assert os.path.normpath(name.file or "x").split("/")[0] != ".."

"""Commands that take a name of the Hugging Face Hub: what they download, export once, and say."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import COMMIT, Hub, asked_by_huggingface_hub
from huggingface_hub import constants
from stageline.exporter.commands.cli import main
from stageline.exporter.commands.serve import names_of

TEXT = ("--text", "a cat sat", "--json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    with asked_by_huggingface_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def half_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """`tiny_checkpoint` in bfloat16."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "half"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_is_exported_once_and_then_runs_without_a_network(
    hub: Hub, half_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models["org/half"] = half_checkpoint
    assert main(["run", "org/half", *TEXT]) == 0
    first = capsys.readouterr()
    (bundle,) = (tmp_path / "own" / "stageline" / "bundles" / "org--half").glob("[!.]*")
    assert bundle.name.startswith(f"half-{COMMIT[:12]}-stageline-")
    assert f"stageline: exported org/half to {bundle}\n" in first.err
    assert "stageline: downloading 1 file of org/half, 0.1 MB\n" in first.err

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["run", "org/half", *TEXT]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (first.out, "")
    assert main(["run", str(bundle), *TEXT]) == 0
    assert capsys.readouterr().out == first.out

    assert main(["verify", "org/half", "--against", "org/half", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert main(["export", "org/half", "-o", "again"]) == 0
    assert (tmp_path / "again" / "manifest.json").read_text() == (bundle / "manifest.json").read_text()


def test_an_export_that_fails_leaves_no_bundle(
    hub: Hub, half_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (half_checkpoint / "config.json").write_text('{"model_type": "nothing-known"}')
    hub.models["org/half"] = half_checkpoint
    assert main(["run", "org/half", *TEXT]) == 1
    assert "nothing-known" in capsys.readouterr().err.splitlines()[-1]
    assert [f.name for f in (tmp_path / "own" / "stageline" / "bundles" / "org--half").iterdir()] == [".lock"]


def test_a_bundle_runs_from_the_cache_that_the_environment_names(
    hub: Hub, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "engines").mkdir()
    (tmp_path / "bundle" / "engines" / "manifest.json").write_text("{}")
    hub.models["org/bundle"] = tmp_path / "bundle"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token,
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    code = "from stageline.exporter.commands.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "run", "org/bundle", *TEXT]
    online = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert online.returncode == 0, online.stderr
    files = (tmp_path / "home" / "hub" / "models--org--bundle" / "snapshots" / COMMIT).rglob("*")
    assert {f.name for f in files} >= {"manifest.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in hub.downloads if name.startswith("engines/")]
    offline = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert (offline.stdout, offline.stderr) == (online.stdout, "")
    assert main(["run", str(tiny_bundle), *TEXT]) == 0
    assert capsys.readouterr().out == online.stdout


def test_a_path_that_exists_comes_before_a_name(
    hub: Hub, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "org" / "name")
    assert main(["inspect", "org/name"]) == 0
    assert hub.downloads == []
    assert main(["run", "org/other", *TEXT]) == 1
    assert capsys.readouterr().err.startswith("stageline: there is no org/other here nor at http://127.0.0.1:")


def test_messages_about_what_is_in_the_wrong_place(
    hub: Hub, tiny_bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models["org/bundle"] = tiny_bundle
    for arguments, message in [
        (
            ["export", "org/bundle", "-o", "b"],
            "org/bundle holds a bundle, which is exported already; run it: stageline",
        ),
        (["run", str(tiny_checkpoint), *TEXT], "is a checkpoint; export it first: stageline export"),
        (
            ["export", "gpt2", "-o", "b"],
            "gpt2 does not exist; give a checkpoint's folder or a .gguf file, or ORG/NAME of the Hub",
        ),
        (["export", "https://hub.example/org/name", "-o", "b"], "an address; give the name of what is there: org/name"),
        (["run", "hf://org/name", "--text", "a"], "an address; give the name of what is there: org/name"),
        (["inspect", "https://hub.example/org/name/tree/v1"], "give the name of what is there: org/name@v1"),
        (
            ["serve", "https://hub.example/org/name/blob/main/a/b.gguf?download=true"],
            "give the name of what is there: org/name@main:a/b.gguf",
        ),
        (["models", "fetch", "org/x", "--into", "d"], "--into is for reference checkpoints; HF_HUB_CACHE places those"),
    ]:
        assert main(arguments) in (1, 2)
        assert message in capsys.readouterr().err


def test_models_fetch_prints_where_it_is(
    hub: Hub, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models["org/tiny"] = tiny_checkpoint
    assert main(["models", "fetch", "org/tiny@main"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache/models--org--tiny/snapshots/{COMMIT}\n"


def test_clients_call_a_model_by_its_name_on_the_hub(tmp_path: Path) -> None:
    assert names_of([Path("org/name@v1:a.gguf"), tmp_path / "b"], []) == ["org/name", "b"]

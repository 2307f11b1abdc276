"""`stageline layers`: what it prints, what it stores, and what it refuses in one line."""

import json
import shutil
from pathlib import Path

import pytest
from stageline.exporter.commands.cli import main
from stageline.runtime.layers.profile import LayerProfile, read_layers


def test_layers_are_printed_and_stored_in_the_bundle(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert main(["layers", str(path), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "8 rows of 16 tokens: " in said
    assert "matrix products" in said
    assert f"{path}/profiles/layers/" in said
    assert main(["layers", str(path), "--threads", "1", "--quantise", "int8", "--json"]) == 0
    printed = LayerProfile.model_validate(json.loads(capsys.readouterr().out))
    found, unread = read_layers(path)
    assert printed == found[0]
    assert {one.machine.quantise for one in found} == {"int8", None}
    assert unread == []


def test_an_engine_without_times_is_refused_in_a_line(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", str(tiny_bundle), "--engine", "onnxruntime-cuda"]) == 1
    said = "the layers of onnxruntime-cuda cannot be timed; engines whose layers can: onnxruntime, openvino, tensorrt"
    assert capsys.readouterr().err.splitlines() == [f"stageline: {said}"]

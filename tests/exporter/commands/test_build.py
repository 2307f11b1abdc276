"""`stageline build` as a command: what it prints, and what it says of what cannot be built."""

import json
import shutil
from pathlib import Path

import pytest
from stageline.exporter.commands.cli import main
from stageline.runtime.engines.tensorrt.flavour import TENSORRT_RTX

needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt-rtx is not installed")


@needs_rtx
@pytest.mark.slow
def test_engines_are_built_listed_and_kept(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    arguments = ["build", str(bundle), "--target", "portable", "--stripped", "--length", "16"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "target", "precision", "size", "build", "s", "memory", "engine"]
    assert [line.split()[:3] for line in lines[1:]] == [["0", "portable", "bf16"], ["1", "portable", "bf16"]]
    assert main([*arguments, "--json"]) == 0
    message = json.loads(capsys.readouterr().out)
    assert [engine["built"] for engine in message["engines"]] == [False, False]
    assert all(engine["peak_bytes"] > 50e6 for engine in message["engines"])
    assert all(
        (bundle / engine["plan"]["path"]).stat().st_size == engine["plan"]["size_bytes"]
        for engine in message["engines"]
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--target", "ada"], 1, "unknown target 'ada'"),
        (["--target", "sm90"], 1, "only on such a GPU"),
        (["--target", "sm89", "--precision", "fp4"], 2, "'fp4' cannot be built; choose fp32, fp16, bf16"),
        (["--target", "sm89", "--length", "17"], 1, "--length is 17, the model can place 16 tokens; lower it"),
        ([], 2, "Missing option '--target'"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    tiny_bundle: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny_bundle), *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

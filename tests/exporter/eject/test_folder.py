"""Ejected stages are plain ONNX models: Polygraphy, onnx.checker and Netron take them, and their values are right."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import netron
import numpy as np
import onnx
import pytest
import torch
from chromium import CHROMIUM, launched
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from stageline.exporter.commands.cli import main
from transformers import AutoModelForCausalLM


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one of the folder's command lines."""
    name, *arguments = shlex.split(line)
    assert name == "polygraphy"
    command = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def ejected(word_llama: Path, made_once: Callable[..., Path]) -> Path:
    """A bfloat16 bundle of two stages with caches, ejected; do not change it."""
    return made_once("ejected", lambda folder: main(["eject", str(word_llama), "-o", str(folder)]))


def check(bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eject the bundle, and let each stage be checked and compared by its line."""
    assert main(["eject", str(bundle), "-o", str(folder), "--json"]) == 0
    for stage in json.loads(capsys.readouterr().out)["stages"]:
        onnx.checker.check_model(folder / stage["model"], full_check=True)
        done = polygraphy(stage["lines"]["onnxruntime"], folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "Passed: 2/2 iterations" in done.stdout


def test_each_stage_agrees_with_the_bundle_and_a_changed_weight_does_not(
    word_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ejected"
    check(word_llama, folder, capsys)
    line = next(line for line in (folder / "README.md").read_text().splitlines() if "run stage1.onnx --onnxrt" in line)
    model = onnx.load(folder / "stage1.onnx", load_external_data=False)
    place = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight"))
    offset = int(next(entry.value for entry in place.external_data if entry.key == "offset"))
    weights = np.memmap(folder / "stage1.weights", np.float32, "r+", offset, (16,))
    weights += 0.5
    weights.flush()
    assert polygraphy(line, folder).returncode == 1


def test_the_last_stage_gives_what_transformers_gives(ejected: Path, word_llama_checkpoint: Path) -> None:
    """Both samples: the prompt, and the rows that continue another one."""
    first = load_json(str(ejected / "stage0.inputs.json"))
    last = RunResults.load(str(ejected / "stage1.outputs.json"))["stageline"]
    model = AutoModelForCausalLM.from_pretrained(word_llama_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.from_numpy(first[0]["input_ids"])).logits.numpy()
    assert not first[0]["past_lengths"].any()
    assert len(set(first[1]["past_lengths"])) > 1
    np.testing.assert_allclose(last[0]["logits"], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_stage_reads_what_the_one_before_it_wrote(ejected: Path) -> None:
    written = RunResults.load(str(ejected / "stage0.outputs.json"))["stageline"]
    for sample, inputs in enumerate(load_json(str(ejected / "stage1.inputs.json"))):
        crossing = set(inputs) & set(written[sample])
        assert crossing
        for name in crossing:
            np.testing.assert_array_equal(inputs[name], written[sample][name])


def test_models_are_standard_and_weights_are_files_of_their_own(ejected: Path) -> None:
    for number in range(2):
        model = onnx.load(ejected / f"stage{number}.onnx")
        assert {entry.domain for entry in model.opset_import} == {""}
        assert not model.functions
        assert (ejected / f"stage{number}.weights").stat().st_nlink == 1
        assert all(tensor.data_type != onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer)


def test_a_half_precision_graph_is_the_one_that_tensorrt_gets(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ejected"
    assert main(["eject", str(tiny_bundle), "-o", str(folder), "--precision", "bf16"]) == 0
    onnx.checker.check_model(folder / "stage0.onnx", full_check=True)
    weights = onnx.load(folder / "stage0.onnx").graph.initializer
    assert {t.data_type for t in weights if "query.weight" in t.name} == {onnx.TensorProto.BFLOAT16}
    text = (folder / "README.md").read_text()
    assert "no bfloat16 kernels for CPUs" in text
    assert "polygraphy run stage1.onnx --trt --strongly-typed --trt-min-shapes" in text


def test_inspect_and_reduce_take_a_stage(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ejected"
    assert main(["eject", str(tiny_bundle), "-o", str(folder)]) == 0
    lines = [line.strip() for line in (folder / "README.md").read_text().splitlines() if "stage1.onnx" in line]
    inspected = polygraphy(next(line for line in lines if " inspect " in line), folder)
    assert inspected.returncode == 0, inspected.stderr
    assert "Node(s)" in inspected.stdout
    # A check that no model passes: what is left is one node.
    line = next(line for line in lines if " reduce " in line).split(" --check ")[0] + " --check false"
    reduced = polygraphy(line, folder)
    assert reduced.returncode == 0, reduced.stdout[-2000:] + reduced.stderr[-2000:]
    assert len(onnx.load(folder / "stage1.reduced.onnx").graph.node) == 1


@pytest.mark.browser
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium")
def test_netron_reads_a_stage(ejected: Path) -> None:
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, port = netron.start(str(ejected / "stage1.onnx"), address=("localhost", port), browse=False)
    nodes = len(onnx.load(ejected / "stage1.onnx", load_external_data=False).graph.node)
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_page()
        page.route(lambda url: host not in url, lambda route: route.abort())
        page.goto(f"http://{host}:{port}")
        page.get_by_text("Accept").click()
        page.wait_for_selector("#canvas g.node", state="attached")
        assert page.locator("#canvas g.node").count() >= nodes
        browser.close()


@pytest.mark.slow
@pytest.mark.checkpoints
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_the_reference_checkpoints_agree(
    name: str,
    tmp_path: Path,
    link_reference_bundle: Callable[[str, Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(link_reference_bundle(name, tmp_path / "bundle"), tmp_path / "ejected", capsys)


def test_what_is_there_is_not_overwritten(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert main(["eject", str(tiny_bundle), "-o", str(tmp_path / "there")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "exists already; delete it, or choose another place" in line
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "mine"

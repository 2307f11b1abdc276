"""Graphs that are no model, ask for more than there is, or never end: a line for each, and no process that stays."""

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from stageline.models.errors import BundleError, EngineError, StagelineError
from stageline.runtime import Pipeline
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest

SERVE = "from stageline.exporter.commands.cli import main; raise SystemExit(main())"
Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def hostile(bundles: dict[str, Path], tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of a bundle whose last stage was changed, with digests that are right."""

    def make(change: Change) -> Path:
        folder = shutil.copytree(bundles["bert"], tmp_path / "bundle")
        manifest = Bundle.open(folder).manifest
        file = manifest.stages[-1].file
        model = onnx.ModelProto.FromString((folder / file).read_bytes())
        change(model)
        (folder / file).write_bytes(model.SerializeToString())
        files = tuple(file_entry(folder, file) if entry.path == file else entry for entry in manifest.files)
        write_manifest(folder, manifest.model_copy(update={"files": files}))
        return folder

    return make


def unknown_domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)


def without_its_end(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def _before_the_output(model: onnx.ModelProto, node: onnx.NodeProto, *constants: onnx.TensorProto) -> None:
    """Put a node between the last stage's first output and what computes it; it reads `inner`."""
    name = model.graph.output[0].name
    (last,) = (one for one in model.graph.node if name in one.output)
    last.output[list(last.output).index(name)] = "inner"
    node.output.append(name)
    model.graph.initializer.extend(constants)
    model.graph.node.append(node)


def four_terabytes(model: onnx.ModelProto) -> None:
    shape = numpy_helper.from_array(np.array([2**20, 2**20], np.int64), "huge_shape")
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["huge"], ["nought"], keepdims=0))
    _before_the_output(model, helper.make_node("Add", ["inner", "nought"], []), shape)


def endless(model: onnx.ModelProto) -> None:
    number, flag, value = onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_"]), helper.make_node("Add", ["x", "x"], ["x_"])],
        "body",
        [helper.make_tensor_value_info(*one) for one in (("i", number, []), ("on", flag, []), ("x", value, None))],
        [helper.make_tensor_value_info(*one) for one in (("on_", flag, []), ("x_", value, None))],
    )
    trips = numpy_helper.from_array(np.array(2**62, np.int64), "trips")
    always = numpy_helper.from_array(np.array(True), "always")
    _before_the_output(model, helper.make_node("Loop", ["trips", "always", "inner"], [], body=body), trips, always)


@pytest.mark.parametrize(
    ("change", "message"),
    [(unknown_domain, "stage 1 .* did not open: .*elsewhere"), (without_its_end, "stage 1 .* did not open: ")],
)
def test_what_is_no_model_does_not_open(hostile: Callable[[Change], Path], change: Change, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Pipeline.open(hostile(change))


def test_a_graph_that_is_cut_short_is_refused(hostile: Callable[[Change], Path]) -> None:
    folder = hostile(lambda model: None)
    manifest = Bundle.open(folder).manifest
    file = manifest.stages[-1].file
    (folder / file).write_bytes((folder / file).read_bytes()[:-40])
    files = tuple(file_entry(folder, file) if entry.path == file else entry for entry in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    with pytest.raises((BundleError, EngineError), match=file):
        Pipeline.open(folder)


def test_more_memory_than_there_is_fails_the_request_alone(hostile: Callable[[Change], Path]) -> None:
    ids = np.ones((1, 4), np.int64)
    with Pipeline.open(hostile(four_terabytes)) as pipeline:
        for _ in range(2):
            with pytest.raises(StagelineError, match="stage 1 failed in ONNX Runtime"):
                pipeline.run({"input_ids": ids})
        assert pipeline.broken is None


def test_a_service_whose_stage_never_ends_ends(hostile: Callable[[Change], Path]) -> None:
    """It says that it is ready, and cannot end the stage: but itself, with an error, once it is told to."""
    quick = "from stageline.exporter.commands import serve; serve._CLOSE_S = 1.0; "
    command = [sys.executable, "-c", quick + SERVE, "serve", str(hostile(endless)), "--port", "0", "--drain-s", "0.5"]
    running = subprocess.Popen([*command, "--name", "m"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        url = running.stdout.readline().split()[-1]
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": [[1, 2]]}, timeout=2)
        assert httpx.get(f"{url}/health/live", timeout=10).status_code == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 1
        assert running.stderr is not None
        assert "a stage has not ended within 1 s; ending" in running.stderr.read()
    finally:
        running.kill()
        running.communicate()

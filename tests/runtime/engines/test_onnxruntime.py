"""The ONNX Runtime engine on graphs of a few nodes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from stageline.models.errors import EngineError
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores
from stageline.runtime.engines import Engine, StageFile, engine_factory

SPLIT = (
    "(float[batch, 2] x) => (float[batch, 2] twice, float[batch, 2] square) { twice = Add(x, x) square = Mul(x, x) }"
)


def opened(folder: Path, text: str, cores: tuple[int, ...] = (0,)) -> Engine:
    file = folder / "stage.onnx"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> stage {text}')
    file.write_bytes(model.SerializeToString())
    return engine_factory("onnxruntime")(StageFile(3, file, folder), CpuDevice(cores))


@pytest.mark.parametrize("threads", [1, 2])
def test_it_gives_the_outputs_asked_for(tmp_path: Path, threads: int) -> None:
    engine = opened(tmp_path, SPLIT, allowed_cores()[:threads])
    assert (engine.input_names, engine.output_names) == (("x",), ("twice", "square"))
    x = np.array([[1, 2], [3, 4]], np.float32)
    outputs = engine.run({"x": x, "unread": x}, ["square"])
    assert outputs.keys() == {"square"}
    np.testing.assert_array_equal(outputs["square"], x * x)
    engine.close()
    engine.close()


def test_a_failure_names_the_stage_in_one_line(tmp_path: Path) -> None:
    engine = opened(tmp_path, "(float[a] x, float[b] y) => (float[c] z) { z = Add(x, y) }")
    with pytest.raises(EngineError, match=r"^stage 3 failed in ONNX Runtime: [^\n]+$"):
        engine.run({"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)}, ["z"])


def test_a_broken_graph_names_the_stage_and_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^stage 3 \(stage\.onnx\) did not open: [^\n]+$"):
        opened(tmp_path, "(float[a] x) => (float[a] y) { y = NoSuchOperator(x) }")
    with pytest.raises(EngineError, match=r"^stage 3 \(gone\.onnx\) did not open: "):
        engine_factory("onnxruntime")(StageFile(3, tmp_path / "gone.onnx", tmp_path), CpuDevice((0,)))


def test_weights_of_any_precision_are_found_from_the_bundles_folder(tmp_path: Path) -> None:
    weight = np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16)
    (tmp_path / "weights").mkdir()
    (tmp_path / "stages").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"header.." + weight.tobytes())
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> stage (bfloat16[batch, 3] x) => (bfloat16[batch, 2] y) '
        "{ y = MatMul(x, w) }"
    )
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.BFLOAT16, dims=[3, 2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights/w.bin"), ("offset", "8"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    file = tmp_path / "stages" / "0.onnx"
    file.write_bytes(model.SerializeToString())
    engine = engine_factory("onnxruntime")(StageFile(0, file, tmp_path), CpuDevice((0,)))
    x = np.array([[1, 2, 3.5]], np.float32)
    np.testing.assert_array_equal(engine.run({"x": x}, ["y"])["y"], x @ weight.astype(np.float32))

"""What a report says of an engine: the inspector's JSON of TensorRT 10 and of TensorRT 11, and what it may load."""

import json
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from stageline.runtime.builder import worker
from stageline.runtime.builder.report import of_engine
from stageline.runtime.engines.tensorrt.lower import Lowered
from stageline.runtime.engines.tensorrt.records import Options

NOTHING = Lowered(b"", {}, (), (), (), ir.DataType.FLOAT16)
SHAPE = {"Name": "y", "Dimensions": [-1, 64]}
TEN = {**SHAPE, "Location": "Device", "Format/Datatype": "Row major linear FP16 format"}
ELEVEN = {**SHAPE, "Datatype": "Half", "Format": "(Linear) Row major linear format"}


class Runtime:
    """Loads plans of host code only if it is allowed to."""

    engine_host_code_allowed = False

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if plan == b"host code" and not self.engine_host_code_allowed:
            return None
        document = json.dumps({"Layers": self.layers, "I/O Tensors": []})
        inspector = SimpleNamespace(get_engine_information=lambda how: document)
        return SimpleNamespace(
            create_engine_inspector=lambda: inspector,
            num_optimization_profiles=2,
            get_device_memory_size_for_profile_v2=lambda profile: 100 * (profile + 1),
        )


TRT: Any = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="json"))


@pytest.mark.parametrize(("output", "dtype"), [(TEN, "Row major linear FP16 format"), (ELEVEN, "Half")])
def test_types_are_read_from_either_major_version(output: dict[str, Any], dtype: str) -> None:
    layer = {"Name": "mm", "LayerType": "gemm", "Inputs": [], "Outputs": [output]}
    report = of_engine(TRT, Runtime([layer]).deserialize_cuda_engine(b""), NOTHING)
    assert [(one.name, one.kind, one.dtypes, one.shapes) for one in report.layers] == [
        ("mm", "gemm", (dtype,), ((-1, 64),))
    ]
    assert report.dtypes == {dtype: 1}
    assert report.memory_bytes == (100, 200)


@pytest.mark.parametrize("version_compatible", [True, False])
def test_an_engine_with_host_code_is_inspected_if_that_was_asked_for(
    version_compatible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "gpu_here", lambda: "a GPU")
    monkeypatch.setattr(worker, "of_network", lambda parsed, lowered: "of the network")
    trt = SimpleNamespace(Runtime=lambda logger: Runtime(["mm"]), LayerInformationFormat=TRT.LayerInformationFormat)
    parsed: Any = SimpleNamespace(logger=None)
    report = worker._report(trt, parsed, NOTHING, b"host code", Options(version_compatible=version_compatible))
    if version_compatible:
        assert [layer.name for layer in report.layers] == ["mm"]
    else:
        assert report == "of the network"

"""The public face of the runtime: the names that programs import, and what importing them costs."""

import subprocess
import sys

import pytest
import stageline.runtime

PUBLIC = [
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Choice",
    "Completion",
    "DeadlineError",
    "Delta",
    "EngineError",
    "Generation",
    "GenerationRequest",
    "Pipeline",
    "PipelineOptions",
    "PipelineStats",
    "QueueFullError",
    "RequestError",
    "Sampling",
    "StageLostError",
    "StagelineError",
    "StoreError",
    "Structure",
    "TokenLogprob",
    "recut",
]


def test_public_names_are_these() -> None:
    assert stageline.runtime.__all__ == PUBLIC, "a name that programs import was added or removed: CHANGELOG.md says so"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(stageline.runtime, name).__name__ == name
    assert getattr(stageline.runtime, name).__doc__
    assert name in dir(stageline.runtime)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = stageline.runtime.Pipelin


def test_importing_the_face_imports_nothing_else() -> None:
    code = "import sys; import stageline.runtime; print(*(set(sys.modules) & set(sys.argv[1:])))"
    heavy = ["numpy", "onnx_ir", "onnxruntime", "pydantic", "tensorrt_rtx", "torch", "transformers"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""The lowest floor stays light: importing it brings in no framework, and no optional package."""

import pkgutil
import subprocess
import sys

import stageline.models

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "gguf", "ml_dtypes", "pydantic", "rich")


def test_importing_every_module_brings_in_no_framework() -> None:
    modules = [module.name for module in pkgutil.walk_packages(stageline.models.__path__, "stageline.models.")]
    assert {"stageline.models.checkpoint", "stageline.models.packing.gguf"} <= set(modules)
    program = f"import sys, {', '.join(modules)}; print([m for m in {FORBIDDEN} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

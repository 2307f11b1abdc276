"""The real cuda.bindings with a driver library that needs no GPU: every call of the border is made with arguments that
the bindings take, and the tests for real GPUs pass as far as such a library goes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STUB = HERE.parents[2] / "helpers" / "stub_cuda.c"


@pytest.mark.slow
def test_the_tests_for_gpus_pass_on_a_stub_of_the_driver(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, STUB, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", HERE / "test_real_gpu.py"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 passed" in done.stdout

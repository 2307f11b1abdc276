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


def on_stub(folder: Path, *arguments: "str | Path", cuda: int = 13000) -> str:
    """What Python prints, on a driver for this version of CUDA."""
    pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = folder / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", "-O1", f"-DDRIVER_CUDA={cuda}", "-o", str(library), str(STUB), "-ldl"]
    subprocess.run(build, check=True)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tests_for_gpus_pass_on_a_stub_of_the_driver(tmp_path: Path) -> None:
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", HERE / "test_real_gpu.py")
    assert "11 passed" in on_stub(tmp_path, *tests)


@pytest.mark.parametrize(("cuda", "works"), [(12040, False), (12080, True)])
def test_a_driver_that_lacks_a_call_is_one_line(cuda: int, works: bool, tmp_path: Path) -> None:
    """Otherwise the bindings would say so in the middle of a run: the time between two events is CUDA 12.8's."""
    script = (
        "from stageline.models.errors import EngineError\n"
        "from stageline.runtime.devices.cuda.driver import load\n"
        "try: print(load().count())\n"
        "except EngineError as error: print(error)\n"
    )
    old = "the NVIDIA driver is for CUDA 12.4, and Stageline needs one for 12.8 or newer; update the driver\n"
    assert on_stub(tmp_path, "-c", script, cuda=cuda) == ("2\n" if works else old)

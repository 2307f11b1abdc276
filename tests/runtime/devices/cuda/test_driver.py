"""The interface to CUDA: what is called there exists, and a machine without CUDA says so in one line."""

import inspect
import re
import sys

import pytest
from fake_cuda import FakeDriver
from stageline.models.errors import EngineError
from stageline.runtime.devices.cuda import driver as border
from stageline.runtime.devices.cuda.driver import Bindings, CudaError, Driver, load


def methods(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


@pytest.mark.parametrize("kind", [Bindings, FakeDriver])
def test_both_drivers_keep_the_protocol(kind: type) -> None:
    for name in methods(Driver):
        wanted, found = (inspect.signature(getattr(one, name)) for one in (Driver, kind))
        assert wanted.parameters.keys() == found.parameters.keys(), name


def test_every_call_is_one_that_the_bindings_have() -> None:
    cuda = pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    names = re.findall(r"cuda\.(cu\w+|CU\w+(?:\.\w+)?)", inspect.getsource(Bindings))
    assert "cuMemcpyPeerAsync" in names
    for name in names:
        value = cuda
        for part in name.split("."):
            value = getattr(value, part)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Bindings, cuda: object) -> None:
        raise RuntimeError("libcuda.so.1 was not found\n\nlong story")

    pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    monkeypatch.setattr(Bindings, "__init__", absent)
    load.cache_clear()
    with pytest.raises(EngineError, match=r"^there is no NVIDIA driver on this machine; see: stageline doctor$"):
        load()


def test_without_cuda_for_python_the_pip_command_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    load.cache_clear()
    with pytest.raises(EngineError, match=r'CUDA for Python is not installed: pip install "stageline\[gpu\]"'):
        load()


def test_errors_that_end_everything_are_known() -> None:
    assert CudaError("cuLaunchKernel", "CUDA_ERROR_ILLEGAL_ADDRESS").sticky
    assert not CudaError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY").sticky
    assert str(CudaError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")) == "CUDA_ERROR_OUT_OF_MEMORY in cuMemAlloc"
    cuda = pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    assert set(cuda.CUresult.__members__) >= border._STICKY
    end = "the process must be terminated and relaunched"
    ends = {name for name, error in cuda.CUresult.__members__.items() if end in " ".join(str(error.__doc__).split())}
    assert len(ends) >= 12
    assert ends <= border._STICKY

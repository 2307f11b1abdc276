"""ONNX Runtime on a fake GPU: real sessions, on a CPU, run in the streams of a FakeDriver.

What is bound on `cuda` is memory of the fake driver, read and written when the stream comes to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver

_SESSION = ort.InferenceSession


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[str, Any, tuple[int, ...], int]] = {}
        self.outputs: dict[str, tuple[str, Any, tuple[int, ...], int]] = {}

    def bind_input(self, name: str, device: str, ordinal: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        self.inputs[name] = (device, np.dtype(dtype), tuple(shape), address)

    def bind_output(self, name: str, device: str, ordinal: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        self.outputs[name] = (device, np.dtype(dtype), tuple(shape), address)


class Session:
    """As onnxruntime.InferenceSession, of a stage whose provider is CUDA."""

    driver: FakeDriver

    def __init__(self, graph: bytes, options: Any, providers: Sequence[Any]) -> None:
        name, self.settings = providers[0]
        assert name == "CUDAExecutionProvider"
        self._stream = int(self.settings["user_compute_stream"])
        self._session = _SESSION(graph, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        driver, host = self.driver, {}
        for name, (device, dtype, shape, address) in binding.inputs.items():
            if device == "cpu":  # copied at once, as from memory that is not pinned
                size = int(np.prod(shape)) * dtype.itemsize
                raw = (np.ctypeslib.ctypes.c_char * size).from_address(address)
                host[name] = np.frombuffer(bytes(raw), dtype).reshape(shape)
        reads = [bound[3] for bound in binding.inputs.values() if bound[0] == "cuda"]
        writes = [bound[3] for bound in binding.outputs.values()]

        def run() -> None:
            given = host | _arrays(driver, {n: b for n, b in binding.inputs.items() if b[0] == "cuda"})
            names = list(binding.outputs)
            results = self._session.run(names, {name: array.copy() for name, array in given.items()})
            targets = _arrays(driver, binding.outputs)
            for name, result in zip(names, results, strict=True):
                targets[name][...] = result.reshape(targets[name].shape)

        driver.kernel(self._stream, reads, writes, run)


def _arrays(driver: FakeDriver, bound: Mapping[str, tuple[str, Any, tuple[int, ...], int]]) -> dict[str, Any]:
    return {
        name: driver.array(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        for name, (_, dtype, shape, address) in bound.items()
    }


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    """Let ONNX Runtime have CUDA, on `driver`, and let that be this machine's."""
    from stageline.runtime.devices import cuda

    monkeypatch.setattr(Session, "driver", driver, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    def session(graph: Any, options: Any, providers: Sequence[Any]) -> Any:
        on_gpu = not isinstance(providers[0], str)
        return (Session if on_gpu else _SESSION)(graph, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(cuda, "load", lambda: driver)

"""ONNX Runtime on a fake GPU: real sessions, on a CPU, run in the streams of a FakeDriver.

What is bound on `cuda` is memory of the fake driver, read and written when the stream comes to it. Half precision is
emulated: each value is rounded to its type. PagedAttention is done by standard operators. That the real provider takes
these graphs and calls is seen in tests/reality/.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import paged_attention
import pytest
from fake_cuda import FakeDriver
from stageline.runtime.builder.emulate import round_halves
from stageline.runtime.engines import cuda_provider

_SESSION = ort.InferenceSession
_Bound = tuple[str, np.dtype[Any], tuple[int, ...], int]


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, _Bound] = {}
        self.outputs: dict[str, _Bound] = {}

    def bind_input(self, name: str, device: str, ordinal: int, dtype: int, shape: Sequence[int], address: int) -> None:
        self.inputs[name] = (device, ir.DataType(dtype).numpy(), tuple(shape), address)

    def bind_output(self, name: str, device: str, ordinal: int, dtype: int, shape: Sequence[int], address: int) -> None:
        self.outputs[name] = (device, ir.DataType(dtype).numpy(), tuple(shape), address)


class Session:
    """As onnxruntime.InferenceSession, of a stage whose provider is CUDA."""

    driver: FakeDriver

    def __init__(self, graph: bytes, options: Any, providers: Sequence[Any]) -> None:
        name, self.settings = providers[0]
        assert name == "CUDAExecutionProvider"
        self._stream = int(self.settings["user_compute_stream"])
        model = ir.from_proto(onnx.ModelProto.FromString(graph))
        self._inputs, self._outputs = (list(map(_Value, of)) for of in (model.graph.inputs, model.graph.outputs))
        paged_attention.expand(model)
        round_halves(model, ())
        proto = ir.to_proto(model).SerializeToString()
        self._session = _SESSION(proto, options, providers=["CPUExecutionProvider"])
        self._wanted = {value.name for value in self._session.get_inputs()}

    def get_inputs(self) -> list["_Value"]:
        return self._inputs

    def get_outputs(self) -> list["_Value"]:
        return self._outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        driver, host = self.driver, {}
        for name, (device, dtype, shape, address) in binding.inputs.items():
            if device == "cpu":  # read at once
                size = int(np.prod(shape)) * dtype.itemsize
                raw = (np.ctypeslib.ctypes.c_char * size).from_address(address)
                host[name] = np.frombuffer(bytes(raw), dtype).reshape(shape)
        on_gpu = {name: bound for name, bound in binding.inputs.items() if bound[0] == "cuda"}
        reads = [bound[3] for bound in on_gpu.values()]
        writes = [bound[3] for bound in binding.outputs.values()]

        def run() -> None:
            given = host | {name: _plain(array).copy() for name, array in _arrays(driver, on_gpu).items()}
            names = list(binding.outputs)
            results = self._session.run(names, {name: array for name, array in given.items() if name in self._wanted})
            targets = _arrays(driver, binding.outputs)
            for name, result in zip(names, results, strict=True):
                targets[name][...] = result.reshape(targets[name].shape).astype(targets[name].dtype)

        driver.kernel(self._stream, reads, writes, run)


class _Value:
    """As onnxruntime.NodeArg."""

    def __init__(self, value: ir.Value) -> None:
        assert value.shape is not None
        assert value.dtype is not None
        self.name = value.name
        self.shape = [size if isinstance(size, int) else size.value for size in value.shape]
        self.type = f"tensor({ {'float32': 'float', 'float64': 'double'}.get(n := value.dtype.numpy().name, n) })"


def _plain(array: Any) -> Any:
    """Half precision as float32."""
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _arrays(driver: FakeDriver, bound: Mapping[str, _Bound]) -> dict[str, Any]:
    return {
        name: driver.array(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        for name, (_, dtype, shape, address) in bound.items()
    }


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    """Let ONNX Runtime have CUDA, on `driver`, and let that be this machine's."""
    from stageline.runtime.devices import cuda

    monkeypatch.setattr(Session, "driver", driver, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(cuda_provider, "_preload", lambda: "")

    def session(graph: Any, options: Any, providers: Sequence[Any]) -> Any:
        on_gpu = not isinstance(providers[0], str)
        return (Session if on_gpu else _SESSION)(graph, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(cuda, "load", lambda: driver)

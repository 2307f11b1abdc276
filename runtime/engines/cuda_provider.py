"""Starting ONNX Runtime's CUDA provider: which versions will do, where CUDA's libraries lie, and what it lacks."""

import sys
import threading
from functools import cache
from typing import Any

from stageline.models.errors import EngineError

PROVIDER = "CUDAExecutionProvider"
INSTALL = 'pip install "stageline[gpu]"'
_INPUTS = 17  # of PagedAttention, with the bounds that the host reads: since ONNX Runtime 1.31
_lock = threading.Lock()


def cuda_runtime() -> Any:
    """The module onnxruntime, with CUDA's libraries loaded from NVIDIA's wheels where they are installed.

    EngineError if this ONNX Runtime has no CUDA, or is too old. A library that is missing shows when a session opens.
    """
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        raise EngineError(f"this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then {INSTALL}")
    if _paged_inputs() < _INPUTS:
        raise EngineError(f"ONNX Runtime {ort.__version__} is too old for GPUs, it must be 1.31 or later: {INSTALL}")
    with _lock:
        _preload()
    return ort


def why_not_started(ordinal: int) -> str | None:
    """Why the provider does not start on a GPU, in one line: the libraries that did not load, or what it says itself.
    None if it does start."""
    ort = cuda_runtime()
    why = "its CUDA provider gives no reason"
    try:
        session = ort.InferenceSession(_nothing(), providers=[(PROVIDER, {"device_id": str(ordinal)})])
        if PROVIDER in session.get_providers():
            return None
    except Exception as error:  # the backend's exceptions have no common base
        why = " ".join(str(error).split())
    with _lock:
        return _preload() or why


@cache
def _preload() -> str:
    """Load CUDA's libraries, once, and return what could not be loaded."""
    import onnxruntime as ort

    said: list[str] = []
    # What it logs and prints (of plugins for every session, of libraries) is said below, or is no news.
    ort.set_default_logger_severity(4)
    ort.print = lambda *words: said.append(" ".join(map(str, words)))
    try:
        ort.preload_dlls()
    finally:
        del ort.print
    return "; ".join(line for line in said if line.startswith("Failed to load"))


@cache
def _paged_inputs() -> int:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found = [s for s in get_all_operator_schema() if (s.domain, s.name) == ("com.microsoft", "PagedAttention")]
    return max((schema.max_input for schema in found), default=0)


def _nothing() -> bytes:
    """A graph that does nothing."""
    import onnx_ir as ir

    value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 21}, name="nothing")
    proto: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return proto


def start(ordinal: int = 0) -> None:
    """Start the provider on a GPU. EngineError, with the reason, if that fails."""
    why = why_not_started(ordinal)
    if why is not None:
        raise EngineError(f"ONNX Runtime could not start CUDA on cuda:{ordinal}: {why}")


if __name__ == "__main__":  # in a process of its own, which CUDA may take along
    try:
        start()
    except EngineError as error:
        sys.exit(str(error))

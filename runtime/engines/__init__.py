"""Engines, which run one stage on a device each. `engine_factory` finds one by name."""

from collections.abc import Callable
from importlib.util import find_spec

from stageline.models.errors import EngineError
from stageline.runtime.engines.base import (
    Array,
    CacheDtype,
    CacheSize,
    Device,
    Engine,
    EngineFactory,
    PackedRows,
    Sampler,
    StageFile,
    Value,
    WeightDtype,
)

__all__ = [
    "ENGINES",
    "ON_GPUS",
    "WITH_BLOCKS",
    "Array",
    "CacheDtype",
    "CacheSize",
    "Device",
    "Engine",
    "EngineFactory",
    "PackedRows",
    "Sampler",
    "StageFile",
    "Value",
    "WeightDtype",
    "default_device",
    "engine_factory",
    "engine_on",
    "open_sampler",
]


def _onnxruntime() -> EngineFactory:
    try:
        from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise EngineError('the engine onnxruntime is not installed: pip install "stageline[cpu]"') from error
    return OnnxRuntimeEngine


def _onnxruntime_cuda() -> EngineFactory:
    if find_spec("onnxruntime") is None:
        raise EngineError('the engine onnxruntime-cuda is not installed: pip install "stageline[gpu]"')
    from stageline.runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine


def _tensorrt() -> EngineFactory:
    from stageline.runtime.engines.tensorrt.engine import open_tensorrt

    return open_tensorrt


def _openvino() -> EngineFactory:
    if find_spec("openvino") is None:
        raise EngineError('the engine openvino is not installed: pip install "stageline[openvino]"')
    from stageline.runtime.engines.openvino import OpenVinoEngine

    return OpenVinoEngine


ENGINES: dict[str, Callable[[], EngineFactory]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}
"""Engine name -> a function that imports its backend and returns its factory."""

ON_GPUS = frozenset({"onnxruntime-cuda", "tensorrt"})
"""The engines that run on GPUs; the others run on CPUs."""

WITH_BLOCKS = frozenset({"openvino"})
"""The engines whose caches are blocks that any row may have (`Engine.block_tokens`)."""


def default_device(name: str) -> str:
    """The default device of an engine's stages: the first GPU, or the CPU."""
    return "cuda:0" if name in ON_GPUS else "cpu"


def engine_on(name: str, device: str) -> str:
    """The engine of a stage on a device if `name` is requested: next to stages on GPUs, those on `cpu` use onnxruntime.

    EngineError if `name` does not run on that device.
    """
    if device == "cpu":
        return "onnxruntime" if name in ON_GPUS else name
    if name not in ON_GPUS:
        raise EngineError(f"the engine {name} does not run on {device}; engines that do: {', '.join(sorted(ON_GPUS))}")
    return name


def engine_factory(name: str) -> EngineFactory:
    """The factory of the engine called `name`. EngineError if the name is unknown or its backend is not installed."""
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; known engines: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]()


def open_sampler(vocabulary: int, device: Device) -> Sampler | None:
    """What draws tokens on a device, on the thread that will use it. None: the host draws them, as for all CPUs, and
    where ONNX Runtime has no CUDA."""
    if device.name == "cpu":
        return None
    from stageline.runtime.engines.cuda_sampler import CudaSampler

    try:
        return CudaSampler(device, vocabulary)
    except (EngineError, ImportError):
        return None

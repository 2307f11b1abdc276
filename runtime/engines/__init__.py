"""Engines: what runs one stage on a device. `engine_factory` finds one by name."""

from collections.abc import Callable

from stageline.models.errors import EngineError
from stageline.runtime.engines.base import (
    Array,
    CacheDtype,
    CacheSize,
    Device,
    Engine,
    EngineFactory,
    StageFile,
    Value,
    WeightDtype,
)

__all__ = [
    "ENGINES",
    "Array",
    "CacheDtype",
    "CacheSize",
    "Device",
    "Engine",
    "EngineFactory",
    "StageFile",
    "Value",
    "WeightDtype",
    "engine_factory",
]


def _onnxruntime() -> EngineFactory:
    try:
        from stageline.runtime.engines.onnxruntime import OnnxRuntimeEngine
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise EngineError('the engine onnxruntime is not installed: pip install "stageline[cpu]"') from error
    return OnnxRuntimeEngine


ENGINES: dict[str, Callable[[], EngineFactory]] = {"onnxruntime": _onnxruntime}
"""Engine name -> a function that imports its backend and gives its factory."""


def engine_factory(name: str) -> EngineFactory:
    """The factory of the engine called `name`. EngineError if the name is unknown or its backend is not installed."""
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}; known engines: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]()

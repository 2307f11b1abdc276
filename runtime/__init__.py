"""The public face: what programs import to open, run and re-cut bundles. A name's module loads at its first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stageline.models.errors import (
        BundleError,
        CheckpointError,
        DeadlineError,
        EngineError,
        QueueFullError,
        RequestError,
        StagelineError,
        StageLostError,
        StoreError,
    )
    from stageline.runtime.bundle.folder import Bundle
    from stageline.runtime.bundle.recut import recut
    from stageline.runtime.generation.request import (
        Choice,
        Completion,
        Delta,
        GenerationRequest,
        Sampling,
        TokenLogprob,
    )
    from stageline.runtime.generation.stream import Generation
    from stageline.runtime.generation.structure import Structure
    from stageline.runtime.options import PipelineOptions
    from stageline.runtime.pipeline import Pipeline, PipelineStats

__all__ = [
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

_ERRORS = "stageline.models.errors"
_REQUEST = "stageline.runtime.generation.request"
_MODULES = {
    "Bundle": "stageline.runtime.bundle.folder",
    "BundleError": _ERRORS,
    "CheckpointError": _ERRORS,
    "Choice": _REQUEST,
    "Completion": _REQUEST,
    "DeadlineError": _ERRORS,
    "Delta": _REQUEST,
    "EngineError": _ERRORS,
    "Generation": "stageline.runtime.generation.stream",
    "GenerationRequest": _REQUEST,
    "Pipeline": "stageline.runtime.pipeline",
    "PipelineOptions": "stageline.runtime.options",
    "PipelineStats": "stageline.runtime.pipeline",
    "QueueFullError": _ERRORS,
    "RequestError": _ERRORS,
    "Sampling": _REQUEST,
    "StageLostError": _ERRORS,
    "StagelineError": _ERRORS,
    "StoreError": _ERRORS,
    "Structure": "stageline.runtime.generation.structure",
    "TokenLogprob": _REQUEST,
    "recut": "stageline.runtime.bundle.recut",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

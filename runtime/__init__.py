"""Running bundles: engines, devices, the pipeline. `Pipeline` is here for short, imported when it is first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stageline.runtime.generation.request import GenerationRequest, Sampling
    from stageline.runtime.pipeline import Pipeline

__all__ = ["GenerationRequest", "Pipeline", "Sampling"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from stageline.runtime.pipeline import Pipeline

        return Pipeline
    if name in ("GenerationRequest", "Sampling"):
        from stageline.runtime.generation import request

        return getattr(request, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

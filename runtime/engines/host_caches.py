"""Caches in host memory: arrays by the names of the graph inputs that they are bound to."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import Value, on_host
from stageline.runtime.engines.base import Array

Kinds = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and type of each cache, by name."""


def allocated(kinds: Kinds, stage: int, slots: int, capacity: int) -> dict[str, Array]:
    """Caches of zeros for `slots` rows of `capacity` tokens. EngineError if there is no memory for them."""
    try:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in kinds.items()}
    except MemoryError as error:
        total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in kinds.values())
        raise EngineError(
            f"stage {stage}: no memory for caches of {total / 1e9:.1f} GB ({slots} slots of {capacity} tokens); "
            "open with fewer slots or a smaller capacity"
        ) from error


def scratch(layers: Iterable[Kinds]) -> dict[str, Array]:
    """Caches that are discarded after a run, for layers of these kinds. One set of buffers serves all layers of its
    kinds: each reads it right after writing it. They are zeros, since what a mask hides is still multiplied by 0."""
    shared: dict[Any, list[Array]] = {}
    buffers: dict[str, Array] = {}
    for kinds in layers:
        key = tuple(kinds.values())
        if key not in shared:
            shared[key] = [np.zeros(shape, dtype) for shape, dtype in key]
        buffers |= zip(kinds, shared[key], strict=True)
    return buffers


def taken(caches: Mapping[str, Value], kinds: Kinds, stage: int) -> dict[str, Array]:
    """Those of another engine's caches that are of these kinds. EngineError if one is missing, or is of another."""
    for name, (shape, dtype) in kinds.items():
        given = caches.get(name)
        if given is None:
            raise EngineError(f"stage {stage} received no cache {name!r}")
        if (given.shape, given.dtype) != (shape, dtype):
            raise EngineError(
                f"stage {stage} cannot continue with cache {name!r} of {given.dtype} {list(given.shape)}: it keeps "
                f"{dtype} {list(shape)}"
            )
    return on_host(caches, list(kinds))

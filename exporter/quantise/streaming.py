"""Quantising tensors on their way into a file: each is read, rounded and written before the next."""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stageline.exporter.quantise.nearest import ROLES, Parts, Scheme
from stageline.models.errors import ExportError
from stageline.models.tensors import Packing
from stageline.runtime.bundle.graph import ir_dtype

Spec = tuple[str, str, tuple[int, ...]]
"""Name, NumPy dtype and shape of a tensor in a file."""
Data = Callable[[str], Iterable[Any]]
"""The bytes of a tensor by its name, in pieces."""


def quantised(
    schemes: Mapping[str, Scheme], tensors: Iterable[Spec], data: Data
) -> tuple[list[Spec], Data, dict[str, tuple[Packing, dict[str, str]]]]:
    """The tensors with the parts of each in its place that has a scheme, the bytes of all of these, and how each is
    packed, with the names of its parts by role. `data` gives matrices in their dtype.

    A matrix is rounded twice if its parts are not asked for one after the other: scales come last in a file.
    """
    specs: list[Spec] = []
    packed: dict[str, tuple[Packing, dict[str, str]]] = {}
    sources: dict[str, tuple[Spec, int]] = {}
    for name, dtype, shape in tensors:
        scheme = schemes.get(name)
        if scheme is None:
            specs.append((name, dtype, shape))
            continue
        rows, columns = shape
        stem = name.removesuffix("weight")
        parts = {role: f"{stem}{role}" for role in ROLES}
        packed[name] = scheme.packing((rows, columns), dtype), parts
        for place, (part, kind) in enumerate(zip(parts.values(), scheme.parts((rows, columns)), strict=True)):
            specs.append((part, *kind))
            sources[part] = (name, dtype, shape), place

    @lru_cache(maxsize=1)
    def rounded(spec: Spec) -> Parts:
        name, dtype, shape = spec
        values = np.frombuffer(bytearray().join(data(name)), ir_dtype(dtype).numpy()).reshape(shape)
        check_finite(name, values)
        return schemes[name].round(values)

    def chunks(name: str) -> Iterable[Any]:
        if name not in sources:
            return data(name)
        spec, place = sources[name]
        return [np.ascontiguousarray(rounded(spec)[place]).view(np.uint8).reshape(-1).data]

    return specs, chunks, packed


def check_finite(name: str, values: NDArray[Any]) -> None:
    """ExportError if the values of the tensor `name` are not all finite."""
    if not np.isfinite(values).all():
        raise ExportError(
            f"{name} holds values that are infinite or no number, which cannot be quantised; export it without "
            "--quantise, or download the checkpoint again"
        )

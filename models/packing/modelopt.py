"""What NVIDIA's ModelOpt writes: 8-bit floats, or NVFP4."""

from collections.abc import Iterator, Mapping
from typing import Any

from stageline.models.packing.base import Found
from stageline.models.packing.fp4 import Nvfp4
from stageline.models.packing.fp8 import Fp8
from stageline.models.tensors import TensorEntry


class ModelOpt:
    """NVIDIA's ModelOpt: FP8, or NVFP4."""

    def unread(self, stated: Mapping[str, Any]) -> str | None:
        """Its other types."""
        inner = stated.get("quantization")
        kind = stated.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, dict) else None)
        return None if kind in ("FP8", "NVFP4") else ""

    def find(self, stated: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Found]:
        """Both kinds, by their tensors."""
        yield from Nvfp4.find(tensors)
        yield from Fp8().find({}, tensors)

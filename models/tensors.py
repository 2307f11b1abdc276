"""Where a tensor is on disk: what every reader of weights, and everything that references them, agrees on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, known without reading its data."""

    name: str
    dtype: str
    """NumPy name (float32, bfloat16, float8_e4m3fn, bool, ...); of a .gguf the type's own name (F32, Q4_1, ...)."""
    shape: tuple[int, ...]
    """Row-major, as NumPy has it (a .gguf lists its dimensions the other way round; here they are turned)."""
    file: Path
    offset: int
    """First byte in the file, counted from the file's beginning."""
    size_bytes: int


@dataclass(frozen=True)
class Packing:
    """How a quantised weight is stored: what turns the arrays of its parts into values, and nothing about files."""

    method: str
    """A key of `stageline.models.packing.METHODS`: gptq, awq, gguf, ..."""
    settings: Mapping[str, int | str]
    """What the method needs beside the arrays (bits, group, type, ...), by the names that the method documents."""
    shape: tuple[int, ...]
    """Of the weight: [outputs, inputs] of a matrix product."""
    dtype: str
    """NumPy name of the floating type that the weight stands for."""


@dataclass(frozen=True)
class PackedEntry:
    """A quantised weight of a checkpoint, known without reading its data."""

    name: str
    packing: Packing
    parts: Mapping[str, TensorEntry]
    """The tensors that hold it, by their role in the method (qweight, scales, ...)."""

    @property
    def dtype(self) -> str:
        """NumPy name of the floating type that it stands for."""
        return self.packing.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        return self.packing.shape

    @property
    def size_bytes(self) -> int:
        """Bytes of its parts on disk."""
        return sum(part.size_bytes for part in self.parts.values())


Entry = TensorEntry | PackedEntry


def mapped(entry: TensorEntry) -> NDArray[Any]:
    """The tensor's values, mapped from its file, read-only. OSError if that cannot be read."""
    try:
        dtype = np.dtype(entry.dtype)
    except TypeError:  # NumPy itself has no bfloat16 or float8; ml_dtypes, which onnx-ir brings, adds them
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, entry.dtype))
    if not entry.size_bytes:
        return np.empty(entry.shape, dtype)
    data = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.size_bytes,))
    return data.view(np.ndarray).view(dtype).reshape(entry.shape)


def same_data(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes (quantised ones: the same packing and bytes of parts);
    reads both, a few megabytes at a time, up to the first difference. OSError if a file cannot be read."""
    if isinstance(one, PackedEntry) or isinstance(other, PackedEntry):
        return (
            isinstance(one, PackedEntry)
            and isinstance(other, PackedEntry)
            and one.packing == other.packing
            and one.parts.keys() == other.parts.keys()
            and all(same_data(part, other.parts[role]) for role, part in one.parts.items())
        )
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for begin in range(0, one.size_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, one.size_bytes - begin)
            if first.read(length) != second.read(length):
                return False
    return True

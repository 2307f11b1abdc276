"""Where a tensor is on disk: what every reader of weights, and everything that references them, agrees on."""

from dataclasses import dataclass
from pathlib import Path


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

"""Helpers that read ONNX graphs: dtypes, sizes, and the cache of an operator."""

import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir
from stageline.runtime.bundle.manifest import BATCH, LENGTH, CacheSpec

NOMINAL = {BATCH: 8, LENGTH: 128}  # sizes at which the bytes that cross a cut are compared
CACHE_ATTENTION = "CacheAttention"  # in the domain "stageline"; docs/reference/bundle.md specifies it


def size_bytes(shape: Sequence[int | str], dtype: str) -> int:
    """Bytes of a tensor at nominal sizes of its free dimensions."""
    return math.prod(d if isinstance(d, int) else NOMINAL.get(d, 64) for d in shape) * ir_dtype(dtype).numpy().itemsize


def ir_dtype(name: str) -> ir.DataType:
    """The ONNX data type of a NumPy name."""
    named = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e8m0fnu": "FLOAT8E8M0"}
    return ir.DataType[named.get(name, name.upper().replace("FLOAT8_", "FLOAT8"))]


def cache_of(node: ir.Node, name: str) -> CacheSpec:
    """The cache that a CacheAttention node reads and adds to."""
    _, key, value, *_ = node.inputs
    return CacheSpec(name=name, heads=static(key, 1), key_size=static(key, 3), value_size=static(value, 3))


def dimensions(values: Iterable[ir.Value]) -> dict[str, tuple[int | str, ...]]:
    """The sizes of inputs or outputs by name; a free dimension is its name."""
    return {str(value.name): _sizes(value) for value in values}


def _sizes(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def static(value: ir.Value | None, axis: int) -> int:
    """The size of a fixed dimension."""
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def size_read(node: ir.Node) -> str | None:
    """The free dimension whose size a Shape node reads, or None if it reads anything else."""
    if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(shape)
    read = list(shape)[start:end]
    return read[0].value if len(read) == 1 and isinstance(read[0], ir.SymbolicDim) else None

"""The safetensors format, read by its header alone and written tensor by tensor, so that size never costs memory.

The layout: 8 bytes with the header's length (little-endian), a JSON header, then the tensors' data with no holes.
A file from elsewhere is not believed: `read_header` checks every number in it against the file, so whoever holds a
`TensorEntry` may map or reference its bytes without looking again.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stageline.models.errors import CheckpointError
from stageline.models.other_formats import START_BYTES, another_file
from stageline.models.tensors import TensorEntry

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

# The format's name of each type we read, the NumPy (or ml_dtypes) name, bytes an element. The types of less than a
# byte (F4, F6_E2M3, F6_E3M2) are absent: no engine takes them as stored.
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
_FORMAT_NAMES = {numpy_name: (name, itemsize) for name, (numpy_name, itemsize) in _DTYPES.items()}

_AGAIN = "the file is damaged: download it again"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Index the tensors of a safetensors file by name, in the order of their data, without reading any data.

    Raises:
        CheckpointError: the file cannot be read, or its header breaks the format or does not fit the file's size.
    """
    header, file_bytes = _header_bytes(path)
    data_start = 8 + len(header)
    entries = [
        _entry(path, name, value, data_start) for name, value in _parse(path, header).items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.size_bytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.offset - data_start} of the data, but the one "
                f"before it ends at {end - data_start}; {_AGAIN}"
            )
        end += entry.size_bytes
    if end != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes:,} bytes, but its header describes {end:,}; {_AGAIN}")
    return {entry.name: entry for entry in entries}


def header_sha256(path: Path) -> str:
    """SHA-256 (hex) over the 8 length bytes and the header: names, types, shapes and places, but no values.

    Raises:
        CheckpointError: the file cannot be read, or its header does not fit into it.
    """
    header, _ = _header_bytes(path)
    return hashlib.sha256(struct.pack("<Q", len(header)) + header).hexdigest()


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype (NumPy name).

    Raises:
        CheckpointError: safetensors has no such type.
    """
    return _format_type(dtype)[1]


def write_streaming(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[bytes | memoryview]],
) -> str:
    """Write a safetensors file in one pass, holding one chunk at a time, and return the SHA-256 (hex) of the file.

    `tensors` are (name, NumPy dtype name, shape). `chunks(name)` yields that tensor's bytes, little-endian and
    row-major, in pieces of any size; it is called once for each tensor, wider types first, which aligns every tensor
    to its type without holes. The file appears under `path` only when complete.

    Raises:
        CheckpointError: the format has no such dtype.
        OSError: the file cannot be written (a full disk).
        ValueError: a name is given twice, or the chunks of a tensor do not add up to its size.
    """
    prefix, sizes = _layout(tensors)
    unfinished = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        with unfinished.open("wb") as file:
            file.write(prefix)
            digest.update(prefix)
            for name, size_bytes in sizes.items():
                written = 0
                for chunk in chunks(name):
                    written += file.write(chunk)
                    digest.update(chunk)
                if written != size_bytes:
                    raise ValueError(f"tensor {name!r} has {size_bytes} bytes, but its chunks held {written}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest.hexdigest()


def write_sparse(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Write a safetensors file with a true header and no data: a hole of the full size, which reads as zeros.

    Raises:
        CheckpointError: the format has no such dtype.
        OSError: the file cannot be written.
        ValueError: a name is given twice.
    """
    prefix, sizes = _layout(tensors)
    path.write_bytes(prefix)
    os.truncate(path, len(prefix) + sum(sizes.values()))


def _layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """What comes before the data, and each tensor's bytes in the order of the data."""
    placed = []
    for name, dtype, shape in tensors:
        format_name, element_bytes = _format_type(dtype)
        placed.append((element_bytes, name, format_name, shape))
    placed.sort(key=lambda item: -item[0])

    # transformers refuses files that do not say which framework's layout they have.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    end = 0
    for element_bytes, name, format_name, shape in placed:
        if name in header:
            raise ValueError(f"tensor {name!r} is given twice")
        sizes[name] = math.prod(shape) * element_bytes
        header[name] = {"dtype": format_name, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, sizes


def _format_type(dtype: str) -> tuple[str, int]:
    """The format's name of a dtype (NumPy name) and the bytes of one element."""
    if dtype not in _FORMAT_NAMES:
        raise CheckpointError(f"safetensors has no type {dtype}; convert to one of {', '.join(_FORMAT_NAMES)}")
    return _FORMAT_NAMES[dtype]


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON header, unparsed, and the file's size in bytes."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} has {file_bytes} bytes, a safetensors file has at least 8; {_AGAIN}")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                other = another_file(prefix + file.read(START_BYTES))
                if other is not None:
                    raise CheckpointError(f"{path} is {other}")
                raise CheckpointError(
                    f"{path}: the header claims {length:,} bytes, the format allows {MAX_HEADER_BYTES:,}; this is not "
                    "a safetensors file, or a damaged one: download it again"
                )
            if 8 + length > file_bytes:
                raise CheckpointError(
                    f"{path}: the header claims {length:,} bytes, but the file has {file_bytes:,}; {_AGAIN}"
                )
            return file.read(length), file_bytes
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise CheckpointError(f"{path}: the header has {name!r} twice; {_AGAIN}")
            result[name] = value
        return result

    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header begins with {header[:1]!r}, it must begin with b'{{'; {_AGAIN}")
    try:
        parsed = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({_one_line(error)}); {_AGAIN}") from error
    assert isinstance(parsed, dict)  # JSON that begins with a brace
    return parsed


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; {_AGAIN}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{where} has the type {dtype!r}, known are {', '.join(_DTYPES)}; use a checkpoint stored in one of these"
        )
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has the shape {shape!r}, a list of sizes is needed; {_AGAIN}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the data_offsets {offsets!r}, [begin, end] is needed; {_AGAIN}")
    numpy_name, element_bytes = _DTYPES[dtype]
    begin, end = offsets
    needed = math.prod(shape) * element_bytes
    if end - begin != needed:
        raise CheckpointError(
            f"{where} ({dtype} {shape}) needs {needed:,} bytes, but its data_offsets hold {end - begin:,}; {_AGAIN}"
        )
    return TensorEntry(name, numpy_name, tuple(shape), path, data_start + begin, needed)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of integers that a file offset can hold (a bool is an int to Python, but not a size)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

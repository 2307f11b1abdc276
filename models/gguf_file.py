"""The .gguf format, read by its header alone.

gguf's own reader maps a value for every token of the vocabulary (seconds for a large one) and, on a damaged file,
counts to whatever number it finds there. This one walks the header with every step checked against the file's size,
and takes from gguf only the table of quantisation types.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stageline.models.errors import CheckpointError
from stageline.models.other_formats import START_BYTES, another_file
from stageline.models.tensors import TensorEntry
from stageline.models.weight_files import complete

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_NO_MODEL = {
    "adapter": "an adapter (LoRA), not a whole model; merge it into its base model: llama-export-lora",
    "imatrix": "an importance matrix, which llama-quantize reads, not a model",
    "mmproj": "the projector of images or sound of a multimodal model; give the .gguf of its language model",
    "clip": "the projector of images or sound of a multimodal model; give the .gguf of its language model",
    "controlvector": "a control vector, not a model",
}
"""What general.type or general.architecture say of a file that holds no language model."""


class _DamagedError(Exception):
    """Found while walking the header; becomes a CheckpointError that names the file."""


def model_files(names: Iterable[str], folder: Path) -> set[tuple[str, ...]]:
    """The models among the `names` of .gguf files in one folder, each as its file, or its parts in order. A projector
    of images (`mmproj*`) counts only where nothing else is. CheckpointError if a part is missing."""
    all_names = sorted(names)
    models = [name for name in all_names if not name.startswith("mmproj")] or all_names
    return {complete(name, models, folder).files for name in models}


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry], tuple[Path, ...]]:
    """Read a model's metadata, without the arrays of its tokenizer, its tensors by name, and the files that hold them.
    `path` may be any part of a split model. Reads headers only.

    Raises:
        CheckpointError: a file cannot be read or is damaged, a part is missing, or the file holds something else.
    """
    metadata, tensors = read_header(path)
    files = _parts(path, metadata)
    if len(files) > 1:
        metadata, tensors = _read_parts(files)
    for key in ("general.type", "general.architecture"):
        if (held := _NO_MODEL.get(str(metadata.get(key)))) is not None:
            raise CheckpointError(f"{path} holds {held}")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors, only a vocabulary; give the .gguf of the whole model")
    return metadata, tensors, files


def _parts(path: Path, metadata: dict[str, Any]) -> tuple[Path, ...]:
    """The files of the model of which `path` is one, in order."""
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return (path,)
    files = complete(path.name, (file.name for file in path.parent.glob("*.gguf")), path.parent).files
    if len(files) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, whose names end in -00001-of-0000N.gguf and so on; give each its "
            "name again, or merge them: llama-gguf-split --merge"
        )
    return tuple(path.with_name(name) for name in files)


def _read_parts(files: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """The metadata of the first part, and the tensors of all."""
    first: dict[str, Any] = {}
    tensors: dict[str, TensorEntry] = {}
    for number, file in enumerate(files):
        metadata, held = read_header(file)
        stated = (metadata.get("split.no"), metadata.get("split.count"))
        if stated != (number, len(files)):
            raise CheckpointError(
                f"{file} says it is part {stated[0]} of {stated[1]} (counted from 0), its name that it is "
                f"{number} of {len(files)}; give it its own name again"
            )
        if twice := tensors.keys() & held.keys():
            raise CheckpointError(f"{file} holds {min(twice)!r} once more; the parts are of different models")
        first = first or metadata
        tensors |= held
    total = first.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{files[0]} announces {total} tensors, its {len(files)} parts hold {len(tensors)}; "
            "the parts are of different models"
        )
    return first, tensors


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Read one .gguf file's metadata, without the arrays of its tokenizer, and its tensors by name.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or gguf is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs gguf: pip install 'stageline[export]'") from error
    types: dict[int, tuple[str, int, int]] = {
        int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES
    }
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
            if not start.startswith(b"GGUF"):
                other = another_file(start)
                raise CheckpointError(
                    f"{path} is {other}"
                    if other is not None
                    else f"{path} begins with {start[:4]!r}, a .gguf file with b'GGUF'; download it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _walk(path, data, types)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except _DamagedError as error:
        raise CheckpointError(f"{path}: {error}; the file is damaged: download it again") from error
    return metadata, tensors


def _walk(
    path: Path, data: mmap.mmap, types: dict[int, tuple[str, int, int]]
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    cursor = _Cursor(data, 4)
    version = cursor.scalar("<I")
    if version in (2 << 24, 3 << 24):
        raise CheckpointError(f"{path} is big-endian, for IBM's mainframes; download or convert the little-endian file")
    if version not in (2, 3):
        raise CheckpointError(f"{path} has GGUF version {version}, known are 2 and 3; convert the model again")
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")

    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        value = cursor.value(cursor.scalar("<I"))
        if not (key.startswith("tokenizer.") and isinstance(value, list)):
            metadata[key] = value

    found: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        rank = cursor.scalar("<I")
        if rank > _MAX_DIMENSIONS:
            raise _DamagedError(f"tensor {name!r} claims {rank} dimensions, at most {_MAX_DIMENSIONS} are known")
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(rank)]))
        kind = cursor.scalar("<I")
        if kind not in types:
            raise _DamagedError(f"tensor {name!r} has type {kind}, unknown to the installed gguf")
        type_name, block, block_bytes = types[kind]
        # Values are quantised in blocks along a row, so a row is a whole number of blocks.
        row = shape[-1] if shape else 1
        if row % block:
            raise _DamagedError(f"tensor {name!r} ({type_name}) has rows of {row}, no multiple of {block}")
        found.append((name, type_name, shape, cursor.scalar("<Q"), math.prod(shape) // block * block_bytes))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise _DamagedError(f"general.alignment is {alignment!r}, a positive number is needed")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, TensorEntry] = {}
    for name, type_name, shape, offset, size_bytes in found:
        if name in tensors:
            raise _DamagedError(f"tensor {name!r} is there twice")
        begin = data_start + offset
        if begin + size_bytes > len(data):
            raise _DamagedError(f"tensor {name!r} ends at byte {begin + size_bytes:,}, the file has {len(data):,}")
        tensors[name] = TensorEntry(name, type_name, shape, path, begin, size_bytes)
    return metadata, tensors


class _Cursor:
    """A place in the file that moves on as values are read, and never leaves the file."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def advance(self, size_bytes: int) -> int:
        """Step over that many bytes and return where they begin."""
        begin = self.offset
        if begin + size_bytes > len(self.data):
            raise _DamagedError(f"the header reads up to byte {begin + size_bytes:,}, the file has {len(self.data):,}")
        self.offset = begin + size_bytes
        return begin

    def scalar(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.advance(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        begin = self.advance(length)
        # Tokens may be parts of characters; names are ASCII.
        return self.data[begin : begin + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"a metadata value has type {kind}, which does not exist")
        item, count = self.scalar("<I"), self.scalar("<Q")
        if item in _SCALARS:
            layout = _SCALARS[item]
            begin = self.advance(count * struct.calcsize(layout))
            return list(struct.unpack_from(f"<{count}{layout[1]}", self.data, begin))
        if item != _STRING:
            raise _DamagedError(f"a metadata array has items of type {item}, which is not known")
        return [self.string() for _ in range(count)]

"""Weights that are drawn where they are needed: a bundle travels with the headers of its weight files alone."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
from stageline.models.safetensors_file import header_sha256, read_header
from stageline.runtime.bundle.folder import Bundle, read_manifest, write_manifest
from stageline.runtime.bundle.manifest import FileEntry

HEADER = ".header"
_BLOCK = 1 << 22  # numbers that are drawn, and repeated
_DEVIATION = 0.02


def undraw(bundle: Bundle) -> None:
    """Replace the weight files, whose size and header the manifest then vouches for, by their headers."""
    entries = {entry.path: entry for entry in bundle.manifest.files}
    for name in bundle.manifest.weight_files:
        file = bundle.path / name
        begins = min(entry.offset for entry in read_header(file).values())
        with file.open("rb") as stream:
            header = stream.read(begins)
        entries[name] = FileEntry(path=name, size_bytes=file.stat().st_size, header_sha256=header_sha256(file))
        file.unlink()
        file.with_name(file.name + HEADER).write_bytes(header)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": tuple(entries.values())}))


def draw(folder: Path) -> None:
    """Write the weight files of an undrawn bundle, unless they are there: normal numbers of deviation 0.02, which
    repeat after 4 million. All weights of a file are of the bundle's type."""
    manifest = read_manifest(folder)
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    for name in manifest.weight_files:
        file = folder / name
        if file.exists():
            continue
        header, aside = file.with_name(file.name + HEADER).read_bytes(), file.with_name(file.name + ".part")
        with aside.open("wb") as stream:
            stream.write(header)
            left = sizes[name] - len(header)
            for block in _blocks(manifest.dtype):
                stream.write(block[:left])
                left -= min(left, len(block))
                if not left:
                    break
        aside.rename(file)


def _blocks(dtype: str) -> Iterator[memoryview]:
    # NumPy itself has no bfloat16; ml_dtypes, which onnx-ir brings, adds it.
    import ml_dtypes

    normal = _DEVIATION * np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    numbers = normal.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return cycle([memoryview(numbers.tobytes())])

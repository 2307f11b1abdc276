"""A checkpoint under the file names that transformers loads, for the few steps that let transformers load it."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stageline.exporter.narrowing import stored_bytes
from stageline.models.checkpoint import Checkpoint, shards_of
from stageline.models.json_file import read_json_object
from stageline.models.packing import dequantised, read
from stageline.models.safetensors_file import write_streaming
from stageline.models.tensors import PackedEntry
from stageline.models.weight_files import INDEX, SINGLE


@contextmanager
def folder_for_transformers(checkpoint: Checkpoint) -> Iterator[Path]:
    """The folder of a checkpoint in safetensors if transformers would load the same files from it; else a temporary one
    of links, whose index names them. Quantised weights are unpacked into a temporary one, in float32."""
    if any(isinstance(entry, PackedEntry) for entry in checkpoint.tensors.values()):
        with tempfile.TemporaryDirectory(prefix="stageline-") as made:
            _unpack(checkpoint, Path(made))
            yield Path(made)
        return
    folder = checkpoint.path
    if _would_load(folder) == {file.relative_to(folder).as_posix() for file in checkpoint.files}:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="stageline-") as made:
        links = Path(made)
        names = {file: f"{number:05}-{file.name}" for number, file in enumerate(checkpoint.files)}
        for file in (*checkpoint.auxiliary, *checkpoint.files):
            (links / names.get(file, file.name)).symlink_to(file.resolve())
        shards = {name: names[entry.file] for name, entry in checkpoint.stored.items()}
        (links / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        yield links


def _unpack(checkpoint: Checkpoint, folder: Path) -> None:
    tensors = checkpoint.tensors
    specs = [(n, "float32" if isinstance(e, PackedEntry) else e.dtype, e.shape) for n, e in tensors.items()]

    def data(name: str) -> Iterable[bytes | memoryview]:
        entry = tensors[name]
        if isinstance(entry, PackedEntry):
            return [dequantised(entry.packing, read(entry)).reshape(-1).view("uint8").data]
        return stored_bytes(entry)

    write_streaming(folder / SINGLE, specs, data)
    for file in checkpoint.auxiliary:
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))


def _would_load(folder: Path) -> set[str]:
    if (folder / SINGLE).is_file():
        return {SINGLE}
    if not (folder / INDEX).is_file() or "metadata" not in read_json_object(folder / INDEX):
        return set()  # transformers fails on an index without metadata
    return set(shards_of(folder / INDEX).values())

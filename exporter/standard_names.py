"""A checkpoint under the file names that transformers loads, for the few steps that let transformers load it."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageline.models.checkpoint import Checkpoint, shards_of
from stageline.models.json_file import read_json_object
from stageline.models.weight_files import INDEX, SINGLE


@contextmanager
def folder_for_transformers(checkpoint: Checkpoint) -> Iterator[Path]:
    """The folder of a checkpoint in safetensors if transformers would load the same files from it; else a temporary one
    of links, whose index names them."""
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


def _would_load(folder: Path) -> set[str]:
    if (folder / SINGLE).is_file():
        return {SINGLE}
    if not (folder / INDEX).is_file() or "metadata" not in read_json_object(folder / INDEX):
        return set()  # transformers fails on an index without metadata
    return set(shards_of(folder / INDEX).values())

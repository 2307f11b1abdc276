"""Writing a folder so that it exists complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from stageline.models.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write into; it is renamed to `target` at the end, or removed on any error.

    Raises:
        CheckpointError: `target` exists already, or the disk refused something (a full disk).
    """
    unfinished = target.with_name(f".{target.name}.{uuid4().hex[:8]}.unfinished")
    if target.exists():
        raise CheckpointError(f"{target} exists already; delete it, or choose another place")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

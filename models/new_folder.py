"""Writing a folder so that it exists complete or not at all."""

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from stageline.models.errors import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to write into; it is renamed to `target` at the end, or removed on any error.

    An unfinished folder is locked while its process lives. One that a killed process left behind is not, and is removed
    by the next try for the same `target`.

    Raises:
        CheckpointError: `target` exists already, or the disk refused something (a full disk).
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; delete it, or choose another place")
    unfinished = target.with_name(f".{target.name}.{uuid4().hex[:8]}.unfinished")
    made = [folder for folder in unfinished.parents if not folder.exists()]
    try:
        _remove_abandoned(target)
        unfinished.mkdir(parents=True)
        with _locked(unfinished, fcntl.LOCK_EX):
            yield unfinished
            unfinished.rename(target)
    except OSError as error:
        raise CheckpointError(_what_failed(error, target, unfinished)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: it holds the target
                folder.rmdir()


def _remove_abandoned(target: Path) -> None:
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.unfinished"):
        with suppress(OSError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def _what_failed(error: OSError, target: Path, unfinished: Path) -> str:
    """A file that was to be read is named; of those being written only the target is, the others are gone by now."""
    files = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    reason = error.strerror or str(error)
    if files and not any(file.is_relative_to(unfinished) for file in files):
        return f"cannot write {target}: {files[0]}: {reason}"
    return f"cannot write {target}: {reason}"

"""The engines in a bundle's folder: reads and writes `engines/` and its manifest (docs/reference/bundle.md).

A build may end at any moment. So files are written aside and renamed, the manifest last, and only files in the manifest
count. One build at a time holds the folder's lock; it removes what a killed one left behind.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stageline.models.errors import BundleError
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.engines.tensorrt.records import EngineRecord, EnginesManifest, KernelsRecord
from stageline.runtime.validation import read_document

FOLDER = "engines"
MANIFEST = f"{FOLDER}/manifest.json"
UNFINISHED = ".unfinished"  # suffix of files that are being written


def read_engines(bundle: Path) -> EnginesManifest:
    """The engines of the bundle in folder `bundle`; none if it has no manifest of engines. BundleError if that
    is not valid: the bundle itself opens all the same."""
    advice = f"delete {bundle / FOLDER} and build again: stageline build {bundle} --target TARGET"
    try:
        return read_document(EnginesManifest, bundle / MANIFEST, advice)
    except FileNotFoundError:
        return EnginesManifest()


class EngineStore:
    """The engines of a bundle while a build holds the lock. `locked` opens one."""

    def __init__(self, bundle: Path, manifest: EnginesManifest) -> None:
        self.bundle, self.manifest = bundle, manifest

    def aside(self, path: str) -> Path:
        """The temporary file that `keep` will rename to `path`, relative to the bundle. Its name includes the process
        id: a worker of a killed build may still be writing."""
        file = self.bundle / path
        return file.with_name(f".{file.name}.{os.getpid()}{UNFINISHED}")

    def keep(self, path: str) -> None:
        """Rename the temporary file of `path` into place."""
        self.aside(path).replace(self.bundle / path)

    def put(self, record: EngineRecord) -> None:
        """Add an engine, or replace the one with the same file."""
        others = [engine for engine in self.manifest.engines if engine.plan.path != record.plan.path]
        self.write(self.manifest.model_copy(update={"engines": (*others, record)}))

    def put_timings(self, written: str, path: str, entry: FileEntry) -> None:
        """Keep the timing cache in the temporary file of `written` as `path`, in place of the old one."""
        self.aside(written).replace(self.bundle / path)
        others = [timing for timing in self.manifest.timings if timing.path != path]
        timings = (*others, entry.model_copy(update={"path": path}))
        self.write(self.manifest.model_copy(update={"timings": timings}))

    def put_kernels(self, record: KernelsRecord, data: bytes) -> None:
        """Keep compiled kernels as `record.file`, in place of old ones; remove those of engines that are gone."""
        self.aside(record.file.path).write_bytes(data)
        self.keep(record.file.path)
        plans = {engine.plan.sha256 for engine in self.manifest.engines}
        others = [one for one in self.manifest.kernels if one.file.path != record.file.path]
        kept = tuple(one for one in others if one.plan_sha256 in plans)
        self.write(self.manifest.model_copy(update={"kernels": (*kept, record)}))
        self._remove(one.file for one in others if one.plan_sha256 not in plans)

    def prune(self, stale: set[str]) -> int:
        """Remove the engines whose files are named, with their kernels, and return their bytes."""
        gone = [engine for engine in self.manifest.engines if engine.plan.path in stale]
        kept = tuple(engine for engine in self.manifest.engines if engine.plan.path not in stale)
        plans = {engine.plan.sha256 for engine in kept}
        kernels = tuple(one for one in self.manifest.kernels if one.plan_sha256 in plans)
        files = [entry for engine in gone for entry in (engine.plan, engine.report)]
        files += [one.file for one in self.manifest.kernels if one.plan_sha256 not in plans]
        self.write(self.manifest.model_copy(update={"engines": kept, "kernels": kernels}))
        self._remove(files)
        return sum(entry.size_bytes for entry in files)

    def write(self, manifest: EnginesManifest) -> None:
        """Write the manifest to a temporary file and rename it. An OSError leaves the old one in place."""
        aside = self.aside(MANIFEST)
        try:
            aside.write_text(manifest.model_dump_json(indent=1, exclude_none=True, by_alias=True))
            self.keep(MANIFEST)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self.manifest = manifest

    def _remove(self, files: Iterable[FileEntry]) -> None:
        for entry in files:
            (self.bundle / entry.path).unlink(missing_ok=True)


@contextmanager
def locked(bundle: Path) -> Iterator[EngineStore]:
    """The store of the bundle in folder `bundle`, for one build. BundleError if another build is running."""
    folder = bundle / FOLDER
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.glob(f".*{UNFINISHED}"):
            left.unlink(missing_ok=True)
        yield EngineStore(bundle, read_engines(bundle))
        with suppress(OSError):  # not empty: it has engines
            folder.rmdir()
    except BlockingIOError as error:
        raise BundleError(f"another build is running in {folder}; wait for it") from error
    finally:
        os.close(descriptor)

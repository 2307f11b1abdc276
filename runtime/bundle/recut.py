"""Cutting a bundle into other stages, on disk, without torch."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx_ir as ir
from stageline.models.errors import BundleError, StagelineError
from stageline.models.place_file import place_file
from stageline.models.tensors import Entry
from stageline.runtime.bundle.balance import balance, part_costs
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.folder import (
    HASH_LIMIT_BYTES,
    Bundle,
    file_entry,
    read_manifest,
    removed_on_failure,
    write_manifest,
)
from stageline.runtime.bundle.manifest import FileEntry, Stage, UncutManifest
from stageline.runtime.bundle.stitch import stitch


def plan_stages(manifest: UncutManifest, parts: Sequence[ir.Model], stages: int | Sequence[int]) -> list[int]:
    """Number of blocks in each stage: `stages` stages of even cost, or the given counts.

    StagelineError if they do not fit the model's blocks.
    """
    check_stages(manifest.blocks, stages)
    return balance(part_costs(manifest, parts), stages) if isinstance(stages, int) else list(stages)


def check_stages(blocks: int, stages: int | Sequence[int]) -> None:
    """StagelineError if that number of stages, or these numbers of blocks, do not fit a model of `blocks` blocks."""
    if isinstance(stages, int):
        if not 1 <= stages <= blocks:
            raise StagelineError(f"{stages} stages do not fit: the model has {blocks} blocks, so choose 1 to {blocks}")
    elif min(stages, default=0) < 1 or sum(stages) != blocks:
        raise StagelineError(
            f"layers {','.join(map(str, stages))} do not fit: give each stage at least 1 block, {blocks} in all"
        )


def write_stages(
    folder: Path,
    manifest: UncutManifest,
    tensors: dict[str, Entry],
    parts: Sequence[ir.Model],
    counts: Sequence[int],
) -> tuple[list[Stage], list[FileEntry]]:
    """Stitch stages of `counts` blocks and write them into `folder`, each to a temporary file that is then renamed."""
    crossing = Crossing.of(manifest, parts, counts)
    stages, entries = [], []
    for number in range(len(counts)):
        model, stage = stitch(crossing, number, tensors, folder)
        aside = folder / f".{stage.file}.{os.getpid()}"
        with removed_on_failure([aside]):
            ir.save(model, aside)
            aside.replace(folder / stage.file)
        stages.append(stage)
        entries.append(file_entry(folder, stage.file))
    return stages, entries


def recut(path: str | Path, stages: int | Sequence[int]) -> Bundle:
    """Cut the bundle again, into `stages` stages or into stages of the given numbers of blocks, without torch.

    The old stages stay valid until the new manifest is in place. Another that cuts the same bundle waits: it would
    remove files that this one's stages have.
    """
    with _alone(Path(path)):
        return _recut(path, stages)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process. A folder that is none is left for others to complain of."""
    if not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _recut(path: str | Path, stages: int | Sequence[int]) -> Bundle:
    bundle = Bundle.open(path)
    parts = bundle.parts()
    counts = plan_stages(bundle.manifest, parts, stages)
    before = {stage.file for stage in bundle.manifest.stages}
    try:
        new, entries = write_stages(bundle.path, bundle.manifest, bundle.tensors, parts, counts)
        files = [entry for entry in bundle.manifest.files if entry.path not in before]
        manifest = bundle.manifest.model_copy(update={"stages": tuple(new), "files": (*files, *entries)})
        write_manifest(bundle.path, manifest)
    except OSError as error:
        raise BundleError(
            f"cannot write stages into {bundle.path}: {error.strerror}; the bundle is unchanged"
        ) from error
    for name in before - {stage.file for stage in new}:
        (bundle.path / name).unlink(missing_ok=True)
    return Bundle(bundle.path, manifest, bundle.tensors)


def recut_copy(path: str | Path, to: str | Path, stages: int | Sequence[int]) -> Bundle:
    """Like `recut`, on a copy of the bundle in the new folder `to`. Large weights are linked if they can be. What fails
    leaves no folder."""
    manifest, to = read_manifest(Path(path)), Path(to)
    check_stages(manifest.blocks, stages)
    place = partial(_place, link=sum(entry.size_bytes for entry in manifest.files) > HASH_LIMIT_BYTES)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as scratch:
        made = shutil.copytree(path, Path(scratch) / to.name, copy_function=place)
        recut(made, stages)
        made.rename(to)
    return Bundle.open(to)


def _place(source: str, target: str, *, link: bool) -> None:
    place_file(Path(source), Path(target), link=link)

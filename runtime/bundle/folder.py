"""A bundle on disk: opening, checking and writing it. docs/reference/bundle.md specifies the format."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from stageline.models import packing
from stageline.models.errors import BundleError, CheckpointError
from stageline.models.safetensors_file import header_sha256, read_header
from stageline.models.tensors import Entry, PackedEntry, Packing, TensorEntry
from stageline.runtime.bundle.external_data import check_external_data
from stageline.runtime.bundle.hub_cache import stays_inside
from stageline.runtime.bundle.manifest import FileEntry, Manifest, UncutManifest
from stageline.runtime.validation import read_document

MANIFEST = "manifest.json"
HASH_LIMIT_BYTES = 2 * 1024**3
"""Weight files that need no change are copied and hashed at export up to this many bytes in total: more would take
longer than the rest of the export. Larger ones are linked, and their size and header are checked."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and the file and offset of each weight."""

    path: Path
    manifest: Manifest
    tensors: dict[str, Entry] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Open and check the bundle in folder `path`. Every file with a digest is read and compared. BundleError if the
        bundle is missing, changed, unsafe or of another version."""
        folder = Path(path)
        manifest = read_manifest(folder)
        listed = {entry.path: entry for entry in manifest.files}
        used = [*(p.file for p in manifest.parts), *(s.file for s in manifest.stages), *manifest.weight_files]
        used += [manifest.text.tokenizer] if manifest.text else []
        for name in used:
            if name not in listed:
                raise BundleError(
                    f"bundle {folder}: its manifest uses {name} but does not list it; export the bundle again"
                )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda entry: _check_file(folder, entry), manifest.files):
                pass
        for name in (*(part.file for part in manifest.parts), *(stage.file for stage in manifest.stages)):
            check_external_data(folder, name, listed)
        return cls(folder, manifest, tensors_of(folder, manifest))

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tensor that two stages read counts once."""
        return sum(math.prod(entry.shape) for entry in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model's weights on disk."""
        return sum(entry.size_bytes for entry in self.weights.values())

    @property
    def weights(self) -> dict[str, Entry]:
        """The tensors that the model reads, by name; those that hold a packed weight are only in it."""
        names = dict.fromkeys(name for use in self.manifest.uses for name in use.weights.values())
        return {name: self.tensors[name] for name in names}

    def digest(self) -> str:
        """SHA-256 of the manifest, which has the digests of the files."""
        return file_sha256(self.path / MANIFEST)

    def parts(self) -> list[ir.Model]:
        """The graphs of the parts. BundleError if one can no longer be read."""
        try:
            return [ir.load(self.path / part.file) for part in self.manifest.parts]
        except OSError as error:
            raise BundleError(
                f"bundle {self.path}: {error.filename} cannot be read ({error.strerror}); export the bundle again"
            ) from error


def tensors_of(folder: Path, manifest: UncutManifest) -> dict[str, Entry]:
    """Where each tensor of the bundle's weight files lies, and what its packed weights are made of, by name.

    BundleError if a file cannot be read, or a packed weight is of an unknown method or of tensors that are not there.
    """
    stored: dict[str, TensorEntry] = {}
    for name in manifest.weight_files:
        try:
            stored.update(read_header(folder / name))
        except CheckpointError as error:
            raise BundleError(f"bundle {folder}: {error}") from error
    tensors: dict[str, Entry] = {**stored}
    for name, packed in (manifest.packed or {}).items():
        for part in packed.parts.values():
            if part not in stored:
                raise BundleError(
                    f"bundle {folder}: no weight file holds tensor {part!r}, which {name} is packed in; "
                    "export the bundle again"
                )
        entry = PackedEntry(
            name,
            Packing(packed.method, packed.settings, packed.shape, packed.dtype),
            {role: stored[part] for role, part in packed.parts.items()},
        )
        try:
            packing.check(entry.packing, {role: (part.dtype, part.shape) for role, part in entry.parts.items()})
        except CheckpointError as error:
            raise BundleError(f"bundle {folder}: packed weight {name}: {error}; export the bundle again") from error
        tensors[name] = entry
    return tensors


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, validated. BundleError in one line if there is none or it is not
    valid."""
    file = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"no bundle at {folder}; make one with: stageline export CHECKPOINT -o {folder}")
    if not file.is_file() and (folder.suffix == ".gguf" or (folder / "config.json").is_file()):
        raise BundleError(f"{folder} is a checkpoint; export it first: stageline export {folder} -o BUNDLE")
    if not file.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with: stageline export CHECKPOINT -o BUNDLE"
        )
    return read_document(Manifest, file, "export the bundle again")


def _check_file(folder: Path, entry: FileEntry) -> None:
    file = folder / entry.path
    try:
        if not stays_inside(folder, file):
            raise BundleError(f"bundle {folder}: {entry.path} is outside the bundle; export the bundle again")
        size = file.stat().st_size
        if size != entry.size_bytes:
            raise BundleError(
                f"bundle {folder}: {entry.path} has {size} bytes, the manifest lists {entry.size_bytes}; "
                "export the bundle again"
            )
        if entry.sha256 is not None and file_sha256(file) != entry.sha256:
            raise BundleError(
                f"bundle {folder}: {entry.path} was changed since it was exported (SHA-256 differs); "
                "export the bundle again"
            )
        if entry.sha256 is None and (entry.header_sha256 is None or header_sha256(file) != entry.header_sha256):
            raise BundleError(
                f"bundle {folder}: the header of {entry.path} was changed since it was exported; "
                "export the bundle again"
            )
    except FileNotFoundError as error:
        raise BundleError(f"bundle {folder}: {entry.path} is missing; export the bundle again") from error
    except CheckpointError as error:
        raise BundleError(f"bundle {folder}: {error}") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(folder: Path, name: str) -> FileEntry:
    """The manifest's entry for a file of the bundle."""
    return FileEntry(path=name, size_bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest to a temporary file, then rename it over the old one."""
    aside = folder / f".{MANIFEST}.{os.getpid()}"
    with removed_on_failure([aside]):
        aside.write_text(manifest.model_dump_json(indent=1, exclude_none=True))
        aside.replace(folder / MANIFEST)


@contextmanager
def removed_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise

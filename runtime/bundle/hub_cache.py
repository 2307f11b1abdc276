"""Bundles in the Hugging Face Hub's cache, where every file is a symbolic link into a folder of blobs."""

from pathlib import Path


def repository_of(folder: Path) -> Path | None:
    """The folder `models--ORG--NAME` of the cache if `folder` is in one of its snapshots, else None. Resolved."""
    for parent in folder.resolve().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return None


def stays_inside(folder: Path, file: Path) -> bool:
    """Whether `file` of a bundle in `folder` is there, or is a link into the blobs of the repository it came with."""
    real, repository = file.resolve(), repository_of(folder)
    if real.is_relative_to(folder.resolve()):
        return True
    return repository is not None and real.parent == repository / "blobs"

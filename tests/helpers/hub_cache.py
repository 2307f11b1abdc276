"""A folder put into a cache that is laid out as the Hugging Face Hub's."""

import hashlib
import os
import shutil
from pathlib import Path

COMMIT = "1f2e3d4c5b6a798081920a1b2c3d4e5f60718293"


def put_into_cache(folder: Path, cache: Path, name: str, commit: str = COMMIT) -> Path:
    """Copy `folder` into `cache` as revision `main` of the repository `name` (ORG/NAME), and return its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for part in ("blobs", "refs"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot

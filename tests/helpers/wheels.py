"""Published wheels, unpacked into folders of their own: libraries that this environment must not have."""

import fcntl
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "wheels"


def unpacked(requirement: str) -> Path:
    """The folder of the newest wheel that meets `requirement`, downloaded with pip if the cache (which `make clean`
    removes) has none. Skips where pip cannot get it."""
    contents = CACHE / "".join(c if c.isalnum() or c in ".-" else "_" for c in requirement)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that test, one downloads
        if not contents.is_dir():
            with TemporaryDirectory(dir=CACHE) as aside:
                _download(requirement, Path(aside)).rename(contents)
    return contents


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot download {requirement}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "contents")
    return folder / "contents"

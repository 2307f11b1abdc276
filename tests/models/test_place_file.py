"""Placing a file: what is shared, what is copied, and what a symbolic link leads to."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from stageline.models.place_file import place_file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "source").symlink_to("blob")
    return tmp_path / "source"


@pytest.fixture
def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)


@pytest.mark.usefixtures("without_reflinks")
@pytest.mark.parametrize(("link", "links"), [(False, 1), (True, 2)])
def test_the_target_is_a_file_with_the_links_asked_for(source: Path, tmp_path: Path, link: bool, links: int) -> None:
    place_file(source, tmp_path / "target", link=link)
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"weights"
    assert (tmp_path / "target").stat().st_nlink == links


@pytest.mark.usefixtures("without_reflinks")
def test_where_nothing_can_be_linked_it_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    place_file(source, tmp_path / "target", link=True)
    assert (tmp_path / "target").read_bytes() == b"weights"
    assert (tmp_path / "target").stat().st_nlink == 1


def test_a_reflink_is_asked_for_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def share(target: object, request: int, descriptor: int) -> int:
        asked.append(request)
        target.write(os.pread(descriptor, 100, 0))  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(fcntl, "ioctl", share)
    place_file(source, tmp_path / "target", link=True)
    assert asked == [0x40049409]
    assert (tmp_path / "target").read_bytes() == b"weights"
    assert (tmp_path / "target").stat().st_nlink == 1


def test_a_file_that_is_there_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        place_file(source, tmp_path / "target", link=False)
    assert (tmp_path / "target").read_bytes() == b"other"


def test_a_source_that_is_missing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        place_file(tmp_path / "none", tmp_path / "target", link=False)
    assert not (tmp_path / "target").exists()

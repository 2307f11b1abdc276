"""A folder appears complete or not at all, and nothing else stays."""

import subprocess
import sys
from pathlib import Path

import pytest
from stageline.models.errors import CheckpointError
from stageline.models.new_folder import new_folder


def write(target: Path, content: str) -> None:
    with new_folder(target) as folder:
        (folder / "file").write_text(content)


def fail(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "file").touch()
        raise ZeroDivisionError


def test_a_folder_appears_with_the_parents_it_needs(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "whole")
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_failure_leaves_nothing_not_even_parents(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for target in (tmp_path / "a" / "b" / "c", tmp_path / "kept" / "c"):
        with pytest.raises(ZeroDivisionError):
            fail(target)
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_places_that_are_there_already(target: str) -> None:
    with pytest.raises(CheckpointError, match="exists already; delete it, or choose another place"):
        write(Path(target), "")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*/b: .*/absent: No such file or directory"),
        new_folder(tmp_path / "b"),
    ):
        (tmp_path / "absent").read_bytes()


WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from stageline.models.new_folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    print("begun", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_try(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (unfinished,) = tmp_path.iterdir()
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / "b")
        assert list(tmp_path.iterdir()) == [unfinished], "it is still being written"
        other.kill()
    assert list(tmp_path.iterdir()) == [unfinished]
    write(tmp_path / "b", "whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]

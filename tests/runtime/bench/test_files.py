"""Runs as files: each format carries a run and its requests, and what cannot be read is refused."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic_runs
from stageline.models.errors import StagelineError, StoreError
from stageline.runtime.bench import files
from stageline.runtime.bench.columns import pack, unpack
from stageline.runtime.bench.files import ExportedRun
from stageline.runtime.bench.records import COLUMNS


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_a_run_and_its_requests_come_back_from_each_format(suffix: str, tmp_path: Path) -> None:
    run, requests = synthetic_runs.run(3), [synthetic_runs.requests(30), synthetic_runs.requests(7, seed=1)]
    exported = ExportedRun(run, requests, [synthetic_runs.timeline(20)])
    files.save(exported, tmp_path / f"run.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"run.{suffix}"]
    loaded = files.load(tmp_path / f"run.{suffix}")
    assert loaded.run == run
    assert loaded.timelines == (exported.timelines if suffix == "json" else [])
    for before, after in zip(requests, loaded.requests, strict=True):
        for name, dtype in COLUMNS:
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(after, name).dtype == dtype


def test_a_csv_is_a_table_of_requests_with_the_run_in_a_comment(tmp_path: Path) -> None:
    files.save(ExportedRun(synthetic_runs.run(3), [synthetic_runs.requests(30)], []), tmp_path / "run.csv")
    first, head, *rows = (tmp_path / "run.csv").read_text().splitlines()
    assert first.startswith("# stageline-run {")
    assert head.split(",") == ["measurement", "contender", "load", *(name for name, _ in COLUMNS)]
    assert len(rows) == 30
    assert rows[0].startswith("0,stageline,Server 20/s,0,")


@pytest.mark.parametrize("before", ["", "x,", "x;", '",'])
@pytest.mark.parametrize("begins", ["=HYPERLINK(1)", "+1+1", "-2+3+cmd|' /C calc'!A0", "-a", "@SUM(1)"])
def test_no_cell_of_a_csv_is_a_formula(before: str, begins: str, tmp_path: Path) -> None:
    """As a spreadsheet cuts it, with commas or semicolons; numbers may have a sign."""
    run = replace(synthetic_runs.run(3), bundle=before + begins)
    run = replace(run, measurements=tuple(replace(one, contender=begins) for one in run.measurements))
    files.save(ExportedRun(run, [synthetic_runs.requests(3)], []), tmp_path / "run.csv")
    assert files.load(tmp_path / "run.csv").run == run
    for delimiter in ",;":
        for row in csv.reader((tmp_path / "run.csv").read_text().splitlines(), delimiter=delimiter):
            assert not [cell for cell in row if re.match(r"[=+@-](?!\d[\d.eE+-]*$)", cell)]


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    exported = ExportedRun(synthetic_runs.run(3), [], [])
    with pytest.raises(StagelineError, match=r"ends with '.txt'; give a file that ends with .json, .csv or .parquet"):
        files.save(exported, tmp_path / "run.txt")
    with pytest.raises(StagelineError, match="cannot be written: No such file or directory; choose another file"):
        files.save(exported, tmp_path / "nowhere" / "run.json")
    (tmp_path / "run.json").write_text('{"format": "stageline-run", "version": 2}')
    with pytest.raises(StoreError, match="version 2; this stageline reads version 1: install a newer stageline"):
        files.load(tmp_path / "run.json")
    (tmp_path / "run.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match=r"is not an exported run \(its first line is not the run\); export it again"):
        files.load(tmp_path / "run.csv")


def test_columns_keep_their_types_and_a_cut_blob_is_damaged() -> None:
    columns = {"a": np.arange(5, dtype=np.uint16), "b": np.linspace(0, 1, 5)}
    blob = pack(columns)
    for name, column in unpack(blob).items():
        np.testing.assert_array_equal(column, columns[name])
        assert column.dtype == columns[name].dtype
    with pytest.raises(StoreError, match="is damaged"):
        unpack(blob[: len(blob) // 2])
    assert unpack(pack({})) == {}

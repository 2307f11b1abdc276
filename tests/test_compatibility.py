"""A thin part of benchmarks/compatibility.py, in bfloat16 where there is a choice: one row of each kind stays right."""

import sys
from pathlib import Path
from typing import Any

import formats
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compatibility

pytestmark = pytest.mark.slow
ROWS = {
    "generator: sharded, bfloat16": ["export", "run", "recut", "swap weights", "quantise int8"],
    "classifier: single, bfloat16": ["export", "inspect", "run", "build int8"],
    "gguf: Q4_K": ["export", "run"],
}


@pytest.mark.parametrize("row", ROWS)
def test_a_format_gives_what_transformers_gives(row: str, tmp_path: Path) -> None:
    (subject,) = compatibility.subjects(row, tmp_path)
    cells = {column: compatibility.tried(compatibility.COLUMNS[column], subject) for column in ROWS[row]}
    assert {column: (cell.verdict, cell.line) for column, cell in cells.items()} == dict.fromkeys(
        ROWS[row], ("yes", "")
    )


@pytest.mark.parametrize("method", formats.QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(method: str, tmp_path: Path) -> None:
    (subject,) = compatibility.subjects(f"quantised: {method}", tmp_path)
    cell = compatibility.tried(compatibility.export_only, subject)
    assert (cell.verdict, not subject.bundle.exists()) == ("refused", True), cell.line


def test_a_wrong_answer_is_not_taken_for_a_right_one(tmp_path: Path) -> None:
    other: Any = formats.model("classifier", "float32", seed=9)
    (subject,) = compatibility.subjects("classifier: single, bfloat16", tmp_path)
    compatibility.tried(compatibility.export, subject)
    subject.reference = other
    assert compatibility.tried(compatibility.run, subject).verdict == "WRONG"

"""A thin part of benchmarks/compatibility.py, in bfloat16 where there is a choice: one row of each kind stays right."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import formats
import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compatibility

pytestmark = pytest.mark.slow
ROWS = {
    "generator: sharded, bfloat16": ["export", "run", "recut", "swap weights", "quantise int8"],
    "gguf: Q4_K": ["export", "run"],
}


@pytest.mark.parametrize("row", ROWS)
def test_a_format_gives_what_transformers_gives(row: str, tmp_path: Path) -> None:
    subject = compatibility.subject_of(row, tmp_path)
    cells = {column: compatibility.tried(compatibility.COLUMNS[column], subject) for column in ROWS[row]}
    assert {column: (cell.verdict, cell.line) for column, cell in cells.items()} == dict.fromkeys(
        ROWS[row], ("yes", "")
    )


@pytest.mark.parametrize("method", formats.REFUSED)
def test_a_checkpoint_of_a_method_that_is_not_read_is_refused_by_its_name(method: str, tmp_path: Path) -> None:
    subject = compatibility.subject_of(f"refused: {method}", tmp_path)
    cell = compatibility.tried(compatibility.export_only, subject)
    assert (cell.verdict, not subject.bundle.exists()) == ("refused", True), cell.line


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> compatibility.Subject:
    """The classifier in bfloat16, exported; its logits are those of transformers."""
    subject = compatibility.subject_of("classifier: single, bfloat16", tmp_path_factory.mktemp("classifier"))
    compatibility.export(subject)
    return subject


@pytest.mark.parametrize("column", ["inspect", "run", "build int8"])
def test_a_classifier_gives_what_transformers_gives(column: str, classifier: compatibility.Subject) -> None:
    cell = compatibility.tried(compatibility.COLUMNS[column], classifier)
    assert (cell.verdict, cell.line) == ("yes", "")


def test_a_wrong_answer_is_not_taken_for_a_right_one(classifier: compatibility.Subject) -> None:
    other: Any = formats.model("classifier", "float32", seed=9)
    assert compatibility.tried(compatibility.run, replace(classifier, reference=other)).verdict == "WRONG"


def test_pairs_are_scored_as_by_transformers_pipeline(classifier: compatibility.Subject) -> None:
    pairs = [("Who sat?", "A cat."), ("A longer question?", "Dogs")]
    asked = [word for pair in pairs for word in ("--pair", *pair)]
    got = json.loads(classifier.command("run", classifier.bundle, *asked, "--json"))["labels"]
    scores = transformers.pipeline("text-classification", model=classifier.name, dtype=torch.float32, top_k=None)
    for row, (text, text_pair) in zip(got, pairs, strict=True):
        want = {one["label"]: one["score"] for one in scores({"text": text, "text_pair": text_pair})}
        assert {one["label"]: one["probability"] for one in row} == pytest.approx(want, abs=1e-5)

"""Bundles made by every version of the format that is read (tests/golden) still give what transformers gives."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.pipeline import Pipeline

GOLDEN = Path(__file__).parents[2] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
VERSIONS = pytest.mark.parametrize("version", [2, 3, 4])


def check_classifier(bundle: Path) -> None:
    inputs = {name: np.array(value) for name, value in EXPECTED["classifier"]["inputs"].items()}
    with Pipeline.open(bundle) as pipeline:
        np.testing.assert_allclose(pipeline.run(inputs)["logits"], EXPECTED["classifier"]["logits"], atol=1e-5)


def check_generator(bundle: Path) -> None:
    expected = EXPECTED["generator"]
    with Pipeline.open(bundle, slots=2, prefill_chunk=4) as pipeline:
        choice = pipeline.generate(expected["prompt"], max_tokens=12, logprobs=0).result(60).choices[0]
    assert list(choice.token_ids) == expected["tokens"]
    np.testing.assert_allclose([entry.logprob for entry in choice.logprobs], expected["logprobs"], atol=1e-4)


CHECKS = {"classifier": check_classifier, "generator": check_generator}


@VERSIONS
@pytest.mark.parametrize("name", CHECKS)
def test_a_golden_bundle_gives_what_transformers_gives_as_it_is_and_recut(
    name: str, version: int, tmp_path: Path
) -> None:
    CHECKS[name](GOLDEN / f"v{version}" / name)
    copy = Path(shutil.copytree(GOLDEN / f"v{version}" / name, tmp_path / name))
    assert len(recut(copy, 1).manifest.stages) == 1
    assert Bundle.open(copy).manifest.version == version
    CHECKS[name](copy)


def test_before_version_4_a_classifier_takes_the_softmax_and_there_are_no_notes() -> None:
    manifest = Bundle.open(GOLDEN / "v3" / "classifier").manifest
    assert (manifest.activation, manifest.notes) == ("softmax", ())


def test_version_2_states_no_attention() -> None:
    manifest = Bundle.open(GOLDEN / "v2" / "generator").manifest
    assert (manifest.attention, manifest.refused, manifest.no_cache_reason) == (None, None, None)


@pytest.mark.parametrize(
    ("version", "advice"),
    [(1, "export the bundle again"), (6, "install a newer stageline, or export the bundle again")],
)
def test_other_versions_are_refused_in_one_line(version: int, advice: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / "v2" / "classifier", tmp_path / "bundle"))
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace('"version": 2,', f'"version": {version},'))
    with pytest.raises(BundleError) as refused:
        Bundle.open(copy)
    assert str(refused.value) == (
        f"{file} has version {version}; this stageline reads versions 2, 3, 4 and 5: {advice}"
    )

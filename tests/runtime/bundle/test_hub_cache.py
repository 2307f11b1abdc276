"""Bundles in the Hub's cache: they open and run, and links that lead elsewhere are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_cache import put_into_cache
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut, recut_copy
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline


@pytest.fixture
def snapshot(tiny_bundle: Path, tmp_path: Path) -> Path:
    return put_into_cache(tiny_bundle, tmp_path / "hub", "org/tiny")


def ids(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        "input_ids": random.integers(5, 12, (rows, 6)),
        "attention_mask": np.ones((rows, 6), np.int64),
        "token_type_ids": np.zeros((rows, 6), np.int64),
    }


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_a_bundle_in_the_cache_computes_as_outside_of_it(snapshot: Path, tiny_bundle: Path, quantise: str) -> None:
    options = PipelineOptions(quantise=quantise)  # type: ignore[arg-type]
    results = []
    for folder in (tiny_bundle, snapshot):
        with Pipeline.open(folder, options) as pipeline:
            results.append(pipeline.run(ids(3)))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])


def test_a_path_that_is_itself_a_link_to_the_snapshot_opens(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(snapshot)
    with Pipeline.open(tmp_path / "named") as pipeline:
        assert pipeline.run(ids(1))


def test_a_copy_that_is_cut_again_holds_files_and_no_links(snapshot: Path, tmp_path: Path) -> None:
    copy = recut_copy(snapshot, tmp_path / "copy", 3)
    assert len(Bundle.open(copy.path).manifest.stages) == 3
    assert not any(file.is_symlink() for file in copy.path.rglob("*"))


def test_cutting_in_place_leaves_the_blobs_as_they_are(snapshot: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    recut(snapshot, 1)
    assert len(Bundle.open(snapshot).manifest.stages) == 1
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before


@pytest.mark.parametrize("where", ["elsewhere", "hub/models--org--other/blobs", "hub/models--org--tiny/refs"])
def test_a_link_to_anything_but_the_blobs_is_refused(snapshot: Path, tmp_path: Path, where: str) -> None:
    weights = snapshot / "weights" / "model.safetensors"
    target = tmp_path / where / "data"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, target)
    weights.unlink()
    weights.symlink_to(target)
    with pytest.raises(BundleError, match=r"weights/model.safetensors is outside the bundle"):
        Bundle.open(snapshot)


def test_blobs_that_are_a_link_out_of_the_cache_are_refused(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="is outside the bundle"):
        Bundle.open(snapshot)


def test_a_folder_with_blobs_that_is_no_cache_gives_no_leave(tiny_bundle: Path, tmp_path: Path) -> None:
    snapshot = put_into_cache(tiny_bundle, tmp_path, "org/tiny")
    plain = tmp_path / "models--org--tiny" / "copies"
    (snapshot.parent).rename(plain)
    with pytest.raises(BundleError, match="is outside the bundle"):
        Bundle.open(plain / snapshot.name)

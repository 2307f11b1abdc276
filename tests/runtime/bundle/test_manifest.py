"""The manifest as data: which uses belong to a stage, which paths are accepted, what is frozen."""

import pytest
from pydantic import ValidationError
from stageline.runtime.bundle.manifest import CACHED_INPUTS, FileEntry, Stage, uses_of

USES = ("prologue", "block 0", "block 1", "block 2", "epilogue")


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (0, 3, USES),
        (0, 1, ("prologue", "block 0")),
        (1, 2, ("block 1",)),
        (1, 3, ("block 1", "block 2", "epilogue")),
    ],
)
def test_a_stage_has_the_uses_of_its_blocks_and_of_its_end_of_the_model(
    first: int, end: int, expected: tuple[str, ...]
) -> None:
    assert uses_of(USES, first, end) == expected


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../outside", "weights/../../outside", "a\\b", "a\0b"])
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="leaves the bundle"):
        FileEntry(path=path, size_bytes=1)


@pytest.mark.parametrize("path", ["stage.000-001.onnx", "weights/model-00001.safetensors", "a..b"])
def test_a_path_inside_the_bundle_is_kept_as_written(path: str) -> None:
    assert FileEntry(path=path, size_bytes=0).path == path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size_bytes": -1}, "greater than or equal to 0"),
        ({"sha256": "0" * 63}, "should match pattern"),
        ({"sha256": "G" * 64}, "should match pattern"),
        ({"sha512": "0"}, "Extra inputs are not permitted"),
    ],
)
def test_a_file_entry_of_wrong_size_or_digest_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FileEntry.model_validate({"path": "a", "size_bytes": 0, **changed})


def test_what_was_read_cannot_be_changed() -> None:
    stage = Stage(file="a", first_block=0, last_block=0, inputs=(), outputs=(), weight_bytes=0, parameters=0)
    with pytest.raises(ValidationError, match="frozen"):
        stage.last_block = 1  # type: ignore[misc]


def test_the_inputs_of_a_model_with_caches_keep_their_names_and_order() -> None:
    """Bundles on disk have these names."""
    assert CACHED_INPUTS == ("input_ids", "past_lengths", "new_lengths", "logits_at")

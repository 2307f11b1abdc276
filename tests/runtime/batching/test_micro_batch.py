"""Pieces cover a batch once, and joining undoes cutting."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.batching.micro_batch import default_rows, join, split, take
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array

MASK = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length"))
SIDEWAYS = TensorSpec(name="sideways", dtype="float32", shape=("length", 2, "batch"))
SHARED = TensorSpec(name="shared", dtype="float32", shape=(3,))
SQUARE = TensorSpec(name="square", dtype="float32", shape=("batch", 1, "length", "length"))
SCALAR = TensorSpec(name="scalar", dtype="float32", shape=())
MODEL = Signature((MASK, SIDEWAYS, SHARED, SCALAR), (SIDEWAYS.model_copy(), SQUARE))


@given(rows=st.integers(1, 9), length=st.integers(1, 6), micro_rows=st.integers(1, 12), data=st.data())
def test_joining_undoes_cutting_up_to_padding(rows: int, length: int, micro_rows: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    numbers = np.arange(length * 2 * rows, dtype=np.float32).reshape(length, 2, rows) + 1
    inputs: dict[str, Array] = {
        "attention_mask": mask,
        "sideways": numbers,
        "shared": np.ones(3, np.float32),
        "scalar": np.array(1, np.float32),
    }
    sizes = {"batch": rows, "length": length}
    pieces = split(MODEL, inputs, sizes, 1, micro_rows)
    parts = []
    for piece in pieces:
        values = take(MODEL, inputs, piece)
        assert (values["shared"].shape, values["scalar"].shape) == ((3,), ())
        assert values["attention_mask"].shape[0] <= micro_rows
        first = values["sideways"][:, 0, :].T  # [batch, length]
        parts.append({"sideways": values["sideways"], "square": (first[:, :, None] * first[:, None, :])[:, None]})
    joined = join(MODEL.outputs, sizes, pieces, parts)
    real = mask.astype(bool)
    first = numbers[:, 0, :].T
    square = (first[:, :, None] * first[:, None, :])[:, None]
    both = (real[:, :, None] & real[:, None, :])[:, None]
    assert joined["sideways"].shape == numbers.shape
    np.testing.assert_array_equal(joined["sideways"].transpose(2, 0, 1)[real], numbers.transpose(2, 0, 1)[real])
    np.testing.assert_array_equal(joined["square"][both], square[both])


def test_similar_rows_share_a_micro_batch_cut_to_its_longest_row() -> None:
    mask = (np.arange(8) < np.array([1, 8, 2, 7])[:, None]).astype(np.int64)
    inputs = {"attention_mask": mask}
    pieces = split(Signature((MASK,), (SQUARE,)), inputs, {"batch": 4, "length": 8}, 1, 2)
    assert [(list(piece.rows), piece.length) for piece in pieces] == [([1, 3], 8), ([2, 0], 2)]  # type: ignore[arg-type]


def test_a_free_dimension_of_unknown_meaning_keeps_rows_whole() -> None:
    odd = TensorSpec(name="odd", dtype="float32", shape=("batch", "patches"))
    mask = np.array([[1, 0], [1, 1]])
    pieces = split(Signature((MASK,), (odd,)), {"attention_mask": mask}, {"batch": 2, "length": 2}, 1, 1)
    assert [piece.length for piece in pieces] == [None, None]


def test_default_rows_keep_stages_busy_unless_the_batch_is_small() -> None:
    assert default_rows(1, 128, places=4, ragged=False) == 1
    assert default_rows(64, 128, places=1, ragged=False) == 64
    assert default_rows(64, 128, places=4, ragged=False) == 8
    assert default_rows(8, 16, places=4, ragged=False) == 128 // 16


def test_micro_batches_are_larger_where_more_tokens_cost_no_more() -> None:
    assert default_rows(64, 16, places=1, ragged=True) == 8
    assert default_rows(64, 16, places=1, ragged=True, step_tokens=512) == 32
    assert default_rows(64, 128, places=4, ragged=False, step_tokens=512) == 8


def test_ragged_rows_go_in_small_micro_batches_even_through_one_stage() -> None:
    mask = (np.arange(64) < np.arange(1, 65)[:, None]).astype(np.int64)
    pieces = split(Signature((MASK,), (SQUARE,)), {"attention_mask": mask}, {"batch": 64, "length": 64}, 1, None)
    assert len(pieces) == 16  # four rows of 32.5 tokens on average are the first to reach 128
    assert [piece.length for piece in pieces] == list(range(64, 0, -4))

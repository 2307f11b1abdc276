"""What a request is refused for, and in which words."""

from typing import Any

import numpy as np
import pytest
from stageline.models.errors import BundleError, RequestError
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature

NAMES = ("input_ids", "attention_mask", "token_type_ids", "scale")
INT = {name: TensorSpec(name=name, dtype="int64", shape=("batch", "length")) for name in NAMES[:3]}
SCALE = TensorSpec(name="scale", dtype="bfloat16", shape=("batch", 2))
HIDDEN = TensorSpec(name="hidden", dtype="float32", shape=("batch", "length", 4))
POOLED = TensorSpec(name="pooled", dtype="float32", shape=("batch", 4))
BERT = Signature((*INT.values(), SCALE), (HIDDEN, POOLED), vocabulary=50, max_positions=6)

IDS = np.ones((2, 3), np.int64)
TWO = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS}, f"unknown input 'ids'; inputs: {', '.join(NAMES)}"),
        ({"input_ids": IDS}, "input 'scale' is missing; the model wants bfloat16 [batch, 2]"),
        ({"scale": TWO}, "input 'input_ids' is missing; the model wants int64 [batch, length]"),
        (
            {"input_ids": IDS.astype(np.float32), "scale": TWO},
            "input 'input_ids' has dtype float32, the model wants int64; convert it with .astype('int64')",
        ),
        (
            {"input_ids": IDS, "scale": TWO.astype(np.float64)},
            "input 'scale' has dtype float64, the model wants float32; convert it with .astype('float32')",
        ),
        (
            {"input_ids": np.full((1, 1), 2**63, np.uint64), "scale": TWO},
            "input 'input_ids' has values outside int64 (9223372036854775808 to 9223372036854775808)",
        ),
        (
            {"input_ids": [[1, 2], [3]], "scale": TWO},
            "input 'input_ids' is not an array: its rows differ in length; pad them to one",
        ),
        (
            {"input_ids": IDS[0], "scale": TWO},
            "input 'input_ids' has shape [3], the model wants [batch, length]: 1 dimensions instead of 2; "
            "give a single row as array[None]",
        ),
        (
            {"input_ids": IDS, "scale": np.ones((2, 3), np.float32)},
            "input 'scale' has shape [2, 3], the model wants [batch, 2]: 3 does not fit, 2 is fixed; "
            "pad or cut the rows to one size",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.ones((2, 4), np.int64), "scale": TWO},
            "input 'attention_mask' has shape [2, 4], the model wants [batch, length]: 4 does not fit, "
            "'length' is 3 elsewhere; pad or cut the rows to one size",
        ),
        (
            {"input_ids": IDS[:0], "scale": TWO[:0]},
            "dimension 'batch' is 0: there is nothing to run; do not send empty requests",
        ),
        (
            {"input_ids": IDS[:, :0], "scale": TWO},
            "dimension 'length' is 0: there is nothing to run; do not send empty requests",
        ),
        (
            {"input_ids": np.ones((2, 7), np.int64), "scale": TWO},
            "rows are 7 tokens long, the model can place 6; truncate them",
        ),
        (
            {"input_ids": np.array([[1, 2], [3, 50]]), "scale": TWO},
            "input_ids row 1, position 1 is 50, outside the vocabulary (0 to 49); "
            "tokenize with the tokenizer of this bundle",
        ),
        (
            {"input_ids": np.array([[1, -1], [3, 4]]), "scale": TWO},
            "input_ids row 0, position 1 is -1, outside the vocabulary (0 to 49); "
            "tokenize with the tokenizer of this bundle",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        BERT.check_inputs(inputs)
    assert str(refusal.value) == message


@pytest.mark.parametrize("shape", [(2**16, 2**15), (2**40, 4), (1, 2**59), (2**31, 1)])
def test_shapes_whose_product_is_beyond_all_memory_are_refused_at_once(shape: tuple[int, int]) -> None:
    """Views of a single number: they take no memory, and would be walked through for ever."""
    many = np.broadcast_to(np.int64(1), shape)
    with pytest.raises(RequestError, match=rf"input 'input_ids' has {shape[0] * shape[1]} values, at most"):
        BERT.check_inputs({"input_ids": many, "attention_mask": many, "scale": TWO})


def test_an_output_may_be_asked_for_many_times() -> None:
    assert BERT.check_outputs(["pooled"] * 100_000) == ("pooled",)
    assert BERT.check_outputs(["pooled", "hidden", "pooled"]) == ("hidden", "pooled")
    with pytest.raises(RequestError, match="unknown output 'x0'"):
        BERT.check_outputs([f"x{number}" for number in range(100_000)])


def test_mask_and_token_types_may_be_left_out() -> None:
    inputs, sizes = BERT.check_inputs({"input_ids": IDS, "scale": TWO})
    assert sizes == {"batch": 2, "length": 3}
    assert tuple(inputs) == NAMES
    np.testing.assert_array_equal(inputs["attention_mask"], np.ones((2, 3)))
    np.testing.assert_array_equal(inputs["token_type_ids"], np.zeros((2, 3)))
    assert inputs["attention_mask"].dtype == inputs["token_type_ids"].dtype == np.int64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64", "bool"])
def test_integers_of_any_kind_are_taken_where_they_fit(dtype: str) -> None:
    inputs, _ = BERT.check_inputs({"input_ids": IDS.astype(dtype), "scale": TWO})
    assert inputs["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(inputs["input_ids"], IDS)


def test_what_fits_is_not_copied() -> None:
    inputs, _ = BERT.check_inputs({"input_ids": IDS, "scale": TWO})
    assert inputs["input_ids"] is IDS


def test_outputs_are_chosen_by_name_in_the_models_order() -> None:
    assert BERT.check_outputs(None) == ("hidden", "pooled")
    assert BERT.check_outputs(["pooled", "hidden", "pooled"]) == ("hidden", "pooled")
    with pytest.raises(RequestError, match=r"^unknown output 'logits'; outputs: hidden, pooled$"):
        BERT.check_outputs(["logits"])
    with pytest.raises(RequestError, match=r"^no output is requested; outputs: hidden, pooled$"):
        BERT.check_outputs([])


def test_an_output_without_a_batch_is_refused_at_open() -> None:
    loss = TensorSpec(name="loss", dtype="float32", shape=())
    with pytest.raises(BundleError, match=r"^output 'loss' has shape \[\], without exactly one dimension 'batch'"):
        Signature(BERT.inputs, (loss,))

"""AWQ's layout, against a packer that sets one number after the other as AutoAWQ documents it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.tensors import Packing

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
OUTPUTS, INPUTS = 48, 96


def pack(numbers: NDArray[np.int64]) -> NDArray[np.int32]:
    rows, columns = numbers.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            for place in range(8):
                words[row, word] |= np.uint32(int(numbers[row, word * 8 + ORDER[place]]) << 4 * place)
    return words.view(np.int32)


def example(group: int) -> tuple[Packing, dict[str, NDArray[Any]], NDArray[np.float32]]:
    rng = np.random.default_rng(group + 7)
    size = INPUTS if group == -1 else group
    numbers = rng.integers(0, 16, (INPUTS, OUTPUTS))
    zeros = rng.integers(0, 16, (INPUTS // size, OUTPUTS))
    scales = rng.normal(0, 0.01, (INPUTS // size, OUTPUTS)).astype(np.float16)
    by_input = np.arange(INPUTS) // size
    weight = (numbers - zeros[by_input]).astype(np.float32) * scales[by_input].astype(np.float32)
    arrays: dict[str, NDArray[Any]] = {"qweight": pack(numbers), "qzeros": pack(zeros), "scales": scales}
    return Packing("awq", {"bits": 4, "group_size": group}, (OUTPUTS, INPUTS), "float16"), arrays, weight.T


@pytest.mark.parametrize("group", [32, -1])
def test_numbers_and_values_are_those_that_were_packed(group: int) -> None:
    packed, arrays, weight = example(group)
    packing.check(packed, {role: (array.dtype.name, array.shape) for role, array in arrays.items()})
    np.testing.assert_array_equal(packing.dequantised(packed, arrays), weight)
    found = packing.groups(packed, arrays)
    assert found is not None
    assert (found.bits, found.group, found.order) == (4, INPUTS if group == -1 else group, None)
    columns = np.arange(INPUTS) // found.group
    values = found.values.astype(np.float32) * found.scales[:, columns] + found.offsets[:, columns]
    np.testing.assert_array_equal(values, weight)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"qweight": (95, 6)}, "its qweight is int32 [95, 6], int32 [96, 6] is needed"),
        ({"qzeros": (1, 6)}, "its qzeros is int32 [1, 6], int32 [3, 6] is needed"),
        ({"scales": (3, 6)}, "its scales is int32 [3, 6], float16 or bfloat16 or float32 [3, 48] is needed"),
    ],
)
def test_parts_that_do_not_fit_are_refused(shapes: dict[str, Any], said: str) -> None:
    packed, arrays, _ = example(32)
    parts = {role: (array.dtype.name, array.shape) for role, array in arrays.items()}
    with pytest.raises(CheckpointError) as error:
        packing.check(packed, {**parts, **{role: ("int32", shape) for role, shape in shapes.items()}})
    assert str(error.value) == said

"""GPTQ's layout, against a packer that sets one number after the other by its documented formula."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.tensors import Packing

Arrays = dict[str, NDArray[Any]]
OUTPUTS, INPUTS = 64, 96


def pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """numbers [n, m] -> int32 [n * bits / 32, m]: number i of a column begins at bit i * bits of the column."""
    count, columns = numbers.shape
    words = [[0] * columns for _ in range(count * bits // 32)]
    for i in range(count):
        for column in range(columns):
            for bit in range(bits):
                place = i * bits + bit
                words[place // 32][column] |= (int(numbers[i, column]) >> bit & 1) << place % 32
    return np.array(words, np.uint32).view(np.int32)


def example(bits: int, group: int, *, first: int = 1, order: str = "none") -> tuple[Packing, Arrays, NDArray[Any]]:
    """A packed weight and the float32 values it stands for; zero points are stored less `first`."""
    rng = np.random.default_rng(bits * 1000 + group)
    size = INPUTS if group == -1 else group
    groups = -(-INPUTS // size)
    numbers = rng.integers(0, 2**bits, (INPUTS, OUTPUTS))
    zeros = rng.integers(0, 2**bits, (groups, OUTPUTS))
    scales = rng.normal(0, 0.01, (groups, OUTPUTS)).astype(np.float16)
    group_of = np.arange(INPUTS) // size
    if order == "mixed":
        group_of = rng.permutation(group_of)
    if order == "uneven":
        group_of = np.sort(rng.integers(0, groups, INPUTS))
    weight = np.empty((OUTPUTS, INPUTS), np.float32)
    for n in range(OUTPUTS):
        for k in range(INPUTS):
            g = group_of[k]
            weight[n, k] = np.float32(numbers[k, n] - zeros[g, n]) * np.float32(scales[g, n])
    arrays: Arrays = {
        "qweight": pack(numbers, bits),
        "qzeros": np.ascontiguousarray(pack((zeros - first).T % 2**bits, bits).T),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }
    kind = "gptq" if first else "gptq_v2"
    settings = {"bits": bits, "group_size": group, "checkpoint_format": kind}
    return Packing("gptq", settings, (OUTPUTS, INPUTS), "float16"), arrays, weight


def checked(packed: Packing, arrays: Arrays) -> None:
    packing.check(packed, {role: (array.dtype.name, array.shape) for role, array in arrays.items()})


def opened(packed: Packing, arrays: Arrays) -> None:
    checked(packed, arrays)
    packing.groups(packed, arrays)


def unpacked(packed: Packing, arrays: Arrays) -> NDArray[np.float32]:
    """By the sum that Groups documents."""
    found = packing.groups(packed, arrays)
    assert found is not None
    assert found.zeros is not None
    assert found.values.max() < 2**found.bits
    assert found.zeros.max() < 2**found.bits
    columns = np.arange(INPUTS) // found.group
    weight = np.empty((OUTPUTS, INPUTS), np.float32)
    order = np.arange(INPUTS) if found.order is None else found.order
    weight[:, order] = found.values.astype(np.float32) * found.scales[:, columns] + found.offsets[:, columns]
    np.testing.assert_array_equal(found.offsets, -(found.zeros.astype(np.float32) * found.scales))
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("order", ["none", "mixed"])
def test_numbers_and_values_are_those_that_were_packed(bits: int, group: int, first: int, order: str) -> None:
    packed, arrays, weight = example(bits, group, first=first, order=order)
    checked(packed, arrays)
    np.testing.assert_array_equal(unpacked(packed, arrays), weight)
    np.testing.assert_array_equal(packing.dequantised(packed, arrays), weight)


def test_groups_that_end_short() -> None:
    packed, arrays, weight = example(4, 40)
    checked(packed, arrays)
    np.testing.assert_array_equal(unpacked(packed, arrays), weight)
    np.testing.assert_array_equal(packing.dequantised(packed, arrays), weight)


def test_an_order_is_named_only_where_there_is_one() -> None:
    for order, there in (("none", False), ("mixed", True)):
        packed, arrays, _ = example(4, 32, order=order)
        found = packing.groups(packed, arrays)
        assert found is not None
        assert (found.order is not None) == there


def test_groups_of_different_sizes_are_values_only() -> None:
    packed, arrays, weight = example(4, 32, order="uneven")
    assert packing.groups(packed, arrays) is None
    np.testing.assert_array_equal(packing.dequantised(packed, arrays), weight)


def test_without_g_idx_groups_follow_each_other() -> None:
    packed, arrays, weight = example(4, 32)
    del arrays["g_idx"]
    checked(packed, arrays)
    np.testing.assert_array_equal(unpacked(packed, arrays), weight)


def test_scales_may_be_bfloat16() -> None:
    import ml_dtypes

    packed, arrays, _ = example(4, 32)
    rounded = arrays["scales"].astype(ml_dtypes.bfloat16)
    in_float32 = packing.dequantised(packed, {**arrays, "scales": rounded.astype(np.float32)})
    np.testing.assert_array_equal(packing.dequantised(packed, {**arrays, "scales": rounded}), in_float32)


@pytest.mark.parametrize(
    ("bits", "part", "change", "said"),
    [
        (4, "qweight", lambda a: a[:-1], "its qweight is int32 [11, 64], int32 [12, 64] is needed"),
        (4, "scales", lambda a: a[:2], "its scales is float16 [2, 64], float16 or bfloat16 or float32 [3, 64]"),
        (4, "qzeros", lambda a: a.astype(np.int64), "its qzeros is int64 [3, 8], int32 [3, 8] is needed"),
        (4, "g_idx", lambda a: a[1:], "its g_idx is int32 [95], int32 or int64 [96] is needed"),
        (4, "g_idx", lambda a: a + 1, "its g_idx names groups 1 to 3, but there are 3"),
        (4, "g_idx", lambda a: a - 1, "its g_idx names groups -1 to 1, but there are 3"),
        (4, "scales", None, "its scales is missing"),
        (5, "scales", lambda a: a, "it has 5 bits, read are 2, 3, 4, 8"),
        (8, "scales", lambda a: a, "its qweight is int32 [12, 64], int32 [24, 64] is needed"),
    ],
)
def test_parts_that_do_not_fit_are_refused(bits: int, part: str, change: Any, said: str) -> None:
    packed, arrays, _ = example(4, 32)
    packed = Packing(packed.method, {**packed.settings, "bits": bits}, packed.shape, packed.dtype)
    kept = {role: array for role, array in arrays.items() if role != part}
    changed = kept if change is None else {**kept, part: change(arrays[part])}
    with pytest.raises(CheckpointError) as error:
        opened(packed, changed)
    assert str(error.value).startswith(said)

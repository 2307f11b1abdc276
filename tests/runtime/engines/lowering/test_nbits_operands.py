"""Operands of MatMulNBits against the exact weight, by the operator's own formula in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.packing.base import Groups
from stageline.runtime.engines import Array
from stageline.runtime.engines.lowering.nbits_operands import Operands, operand_bytes, operands


def numbers(packed: Array, bits: int, count: int) -> Array:
    """Packed along the last axis -> one number each, the first `count` of them."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed[..., :count].astype(np.float32)


def matrix(made: Operands) -> Array:
    """[N, width], as the operator reads it."""
    blocks = made.scales.shape[1]
    steps = numbers(made.values, made.bits, made.block) - numbers(made.zeros, made.bits, blocks)[:, :, None]
    return (steps * made.scales[:, :, None]).reshape(len(made.values), -1)[:, : made.width]


def drawn(rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, whole: bool) -> Groups:
    count = -(-columns // group)
    scales = rng.uniform(-1, 1, (rows, count)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 2**bits, (rows, count)).astype(np.uint8)
    offsets = -zeros * scales if whole else rng.normal(0, 2, (rows, count)).astype(np.float32)
    values = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    return Groups(values, bits, group, scales, offsets, zeros if whole else None)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    count=st.integers(1, 5),
    group=st.sampled_from([16, 32, 48, 64, 128, 256]),
    bits=st.integers(2, 8),
)
def test_whole_zero_points_are_exact(seed: int, rows: int, count: int, group: int, bits: int) -> None:
    groups = drawn(np.random.default_rng(seed), rows, count * group, bits, group, whole=True)
    made = operands(groups)
    assert made is not None
    assert made.width == count * group
    assert np.array_equal(matrix(made), groups.weight())


@settings(deadline=None)
@given(seed=st.integers(0, 99), columns=st.integers(1, 100))
def test_a_row_of_one_scale_may_have_any_length(seed: int, columns: int) -> None:
    groups = drawn(np.random.default_rng(seed), 3, columns, 4, max(columns, 16), whole=True)
    made = operands(groups)
    assert made is not None
    assert np.array_equal(matrix(made), groups.weight())


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    group=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([2, 4, 5, 8]),
)
def test_offsets_that_are_no_zero_points_come_back_with_the_sums(seed: int, count: int, group: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    groups = drawn(rng, 3, count * group, bits, group, whole=False)
    made = operands(groups)
    assert made is not None
    x = rng.normal(0, 1, (4, count * group)).astype(np.float32)
    sums = x.reshape(4, -1, made.block).sum(axis=2)
    spaced = np.pad(sums, [(0, 0), (0, made.padding)])
    extended = np.concatenate([x, *[spaced] * (made.levels - 1), sums], axis=1)
    assert extended.shape[1] == made.width
    got, want = extended @ matrix(made).T, x @ groups.weight().T
    # What is lost of an offset: half a step of 1/7 of 1/7 of the largest (four bits), or of 1/127.
    largest = np.abs(groups.offsets).max() + np.abs(groups.scales).max() * 2**bits
    bound = np.abs(sums).sum(axis=1, keepdims=True) * largest * (0.5 / 49 if made.bits == 4 else 0.5 / 127)
    assert (np.abs(got - want) <= bound * 1.01 + 1e-3).all()


@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    count=st.integers(1, 40),
    group=st.sampled_from([16, 32, 64, 128]),
    bits=st.integers(2, 8),
    whole=st.booleans(),
)
def test_the_bytes_are_counted_without_data(rows: int, count: int, group: int, bits: int, whole: bool) -> None:
    made = operands(drawn(np.random.default_rng(0), rows, count * group, bits, group, whole))
    assert made is not None
    assert operand_bytes(rows, count * group, bits, group, whole) == sum(array.nbytes for array in made.arrays)


@pytest.mark.parametrize(("columns", "group", "whole"), [(48, 24, True), (40, 64, False)])
def test_groups_that_the_operator_does_not_take_are_left(columns: int, group: int, whole: bool) -> None:
    assert operands(drawn(np.random.default_rng(0), 2, columns, 4, group, whole)) is None
    assert operand_bytes(2, columns, 4, group, whole) is None

"""Rounding to the nearest: how far a value may be off, and what stays exact."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.engines.lowering.rounding import rounded

GROUP = 32


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 3 * GROUP),
    bits=st.sampled_from([4, 8]),
    middle=st.sampled_from([0.0, 3.0]),
)
def test_a_weight_is_off_by_half_a_step_of_its_group(
    seed: int, rows: int, columns: int, bits: int, middle: float
) -> None:
    weight = np.random.default_rng(seed).normal(middle, 1, (rows, columns)).astype(np.float32)
    groups = rounded(weight, bits, GROUP)
    assert groups.values.max() < 2**bits
    steps = np.repeat(groups.scales, GROUP, axis=1)[:, :columns]
    # A whole zero point, which groups have that fill the last block, moves the ends by half a step more.
    limit = steps * (0.5 if columns % GROUP == 0 else 1)
    assert (np.abs(groups.weight() - weight) <= limit * 1.001 + 1e-6).all()


def test_zero_stays_zero() -> None:
    """Padding and pruned weights must not turn into noise."""
    weight = np.random.default_rng(0).normal(3, 1, (2, 2 * GROUP)).astype(np.float32)
    weight[0, 5] = weight[1, GROUP] = 0
    found = rounded(weight, 4, GROUP).weight()
    assert found[0, 5] == found[1, GROUP] == 0
    assert not rounded(np.zeros((1, 3), np.float32), 4, GROUP).weight().any()


def test_a_constant_group_is_exact() -> None:
    weight = np.full((1, GROUP), 0.7, np.float32)
    assert np.array_equal(rounded(weight, 4, GROUP).weight(), weight)

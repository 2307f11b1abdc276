"""The types of .gguf files, against gguf's own functions."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.tensors import Packing

gguf = pytest.importorskip("gguf")

GROUPS = {
    "Q4_0": (4, 32), "Q4_1": (4, 32), "Q5_0": (5, 32), "Q5_1": (5, 32), "Q8_0": (8, 32),
    "Q2_K": (2, 16), "Q3_K": (3, 16), "Q4_K": (4, 32), "Q5_K": (5, 32), "Q6_K": (6, 16),
}  # fmt: skip
TABLES = ("IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "TQ1_0", "TQ2_0")
# Where the float16 numbers of a block lie, so that random bytes are no infinities; else at its begin.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Blocks of which every bit is random, but for scales that are small numbers of both signs."""
    rng = np.random.default_rng(len(kind) + columns)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        blocks[:, at : at + 2] = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def packed(kind: str, *shape: int) -> Packing:
    return Packing("gguf", {"type": kind}, shape, "float32")


@pytest.mark.parametrize("kind", [*GROUPS, *TABLES])
def test_values_are_those_of_gguf_bit_by_bit(kind: str) -> None:
    blocks = random_blocks(kind, 6, 1024)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(packing.dequantised(packed(kind, 6, 1024), {"blocks": blocks}), expected)


@pytest.mark.parametrize("kind", GROUPS)
def test_whole_numbers_scales_and_offsets_give_those_values(kind: str) -> None:
    blocks = random_blocks(kind, 5, 768)
    found = packing.groups(packed(kind, 5, 768), {"blocks": blocks})
    assert found is not None
    assert found.order is None
    assert (found.bits, found.group) == GROUPS[kind]
    assert found.values.shape == (5, 768)
    assert found.values.max() == 2**found.bits - 1
    assert found.scales.shape == found.offsets.shape == (5, 768 // found.group)
    by_column = [np.repeat(each, found.group, axis=1) for each in (found.scales, found.offsets)]
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found.values.astype(np.float32) * by_column[0] + by_column[1], expected)
    if found.zeros is not None:
        np.testing.assert_array_equal(found.offsets, -found.zeros.astype(np.float32) * found.scales)
        assert found.zeros.max() < 2**found.bits


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_quantises_is_within_a_step(kind: str) -> None:
    weight = np.random.default_rng(1).normal(size=(4, 256)).astype(np.float32)
    blocks = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    found = packing.groups(packed(kind, 4, 256), {"blocks": blocks})
    assert found is not None
    steps = np.abs(np.repeat(found.scales, 32, axis=1))
    assert (np.abs(found.weight() - weight) <= 1.01 * steps).all()


def test_experts_keep_their_shape() -> None:
    blocks = random_blocks("Q4_K", 6, 512)
    values = packing.dequantised(packed("Q4_K", 2, 3, 512), {"blocks": blocks.reshape(2, 3, -1)})
    np.testing.assert_array_equal(values.reshape(6, 512), gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K))


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS", "IQ2_XXS"])
def test_types_with_a_table_are_no_groups(kind: str) -> None:
    assert packing.groups(packed(kind, 2, 256), {"blocks": random_blocks(kind, 2, 256)}) is None


@pytest.mark.parametrize(
    ("kind", "shape", "parts", "said"),
    [
        ("Q4_1", (2, 64), {"blocks": ("uint8", (2, 39))}, "its blocks is uint8 [2, 39], uint8 [2, 40] is needed"),
        ("Q4_1", (2, 64), {"blocks": ("int8", (2, 40))}, "its blocks is int8 [2, 40], uint8 [2, 40] is needed"),
        ("Q4_K", (2, 64), {}, "Q4_K has blocks of 256 values, but a row has 64"),
        ("Q4_1", (2, 64), {}, "its blocks is missing"),
        ("Q4_1", (2, 0), {"blocks": ("uint8", (2, 0))}, "Q4_1 has blocks of 32 values, but a row has 0"),
        ("Q4_1", (), {"blocks": ("uint8", ())}, "Q4_1 has blocks of 32 values, but a row has 0"),
        ("Q9_K", (2, 64), {}, "the type 'Q9_K' is unknown to the installed gguf; update it"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(kind: str, shape: tuple[int, ...], parts: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        packing.check(packed(kind, *shape), parts)
    assert str(error.value) == said


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the method 'hqq' is unknown, known are .*gguf"):
        packing.check(Packing("hqq", {}, (2, 2), "float32"), {})

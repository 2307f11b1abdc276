"""Numbers of any bits, against Python's own whole numbers."""

import numpy as np
import pytest
from stageline.models.packing.bits import unpack_columns, unpack_rows


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 32, 77])
def test_a_row_of_words_is_a_stream_with_the_lowest_bits_first(bits: int, count: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, count))
    size = -(-count * bits // 32) * 4
    streams = [sum(int(number) << bits * place for place, number in enumerate(row)) for row in numbers]
    words = np.array([np.frombuffer(stream.to_bytes(size, "little"), np.int32) for stream in streams])
    np.testing.assert_array_equal(unpack_rows(words, bits, count), numbers)
    np.testing.assert_array_equal(unpack_columns(np.ascontiguousarray(words.T), bits, count), numbers)


def test_many_rows_are_unpacked_slab_by_slab() -> None:
    numbers = np.random.default_rng(0).integers(0, 16, (301, 4096), dtype=np.uint8)
    words = (numbers[:, 0::2] | numbers[:, 1::2] << 4).view(np.int32)
    np.testing.assert_array_equal(unpack_rows(words, 4, 4096), numbers)
    np.testing.assert_array_equal(unpack_columns(np.ascontiguousarray(words.T), 4, 4096), numbers)

"""Tensors have the values that gguf dequantises, for each of its types."""

from pathlib import Path

import numpy as np
import pytest
from stageline.exporter.gguf.tensors import check_types, dequantised
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError

gguf = pytest.importorskip("gguf", reason="needs gguf")

KINDS = gguf.GGMLQuantizationType
UNREAD = ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64")
SIZES = gguf.GGML_QUANT_SIZES
READ = [kind.name for kind in SIZES if kind.name not in UNREAD]


def write_one(path: Path, name: str) -> Path:
    """A file with one tensor [3, 512] of this type, made of random bytes that are no infinities."""
    kind = KINDS[name]
    block, size = SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", READ)
def test_values_are_those_that_gguf_gives(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_one(tmp_path / "x.gguf", name))
    check_types(checkpoint)
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    got = dequantised(checkpoint.tensors["x"])
    assert got.shape == expected.shape == (3, 512)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", [name for name in UNREAD if KINDS[name] in SIZES])
def test_a_type_that_gguf_cannot_dequantise_is_refused_by_name(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_one(tmp_path / "x.gguf", name))
    with pytest.raises(ExportError, match=f"tensor x has type {name}, which gguf cannot dequantise; convert"):
        check_types(checkpoint)

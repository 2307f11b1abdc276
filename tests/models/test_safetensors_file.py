"""A safetensors header is believed only as far as the file bears it out."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from stageline.models import safetensors_file
from stageline.models.errors import CheckpointError
from stageline.models.tensors import TensorEntry

FLOATS = ["float16", "float32", "float64"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = [*FLOATS, *INTEGERS, "bool"]
GOLDEN_HEADER = (
    b"\x90\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}       '
)
GOLDEN = GOLDEN_HEADER + b"\x00\x00\x80\x3f\x01\x02"


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_files_of_the_safetensors_library_are_indexed_with_their_values(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in tensors.items()}
    save_file(arrays, path)
    held = safetensors_file.read_header(path)
    assert held.keys() == arrays.keys()
    content = path.read_bytes()
    for name, array in arrays.items():
        found = held[name]
        assert (found.name, found.dtype, found.shape, found.file) == (name, array.dtype.name, array.shape, path)
        assert content[found.offset : found.offset + found.size_bytes] == array.tobytes()


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31),
)
def test_written_files_are_read_by_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    generator = np.random.default_rng(seed)
    arrays = {name: generator.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in tensors.items()}
    listed = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    digest = safetensors_file.write_streaming(path, listed, lambda name: [arrays[name].tobytes()])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    for found in safetensors_file.read_header(path).values():
        assert found.offset % np.dtype(found.dtype).itemsize == 0


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_file_gives_a_checkpoint_error_or_entries_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(GOLDEN)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    path.write_bytes(content)
    try:
        held = safetensors_file.read_header(path)
    except CheckpointError as error:
        held, message = {}, str(error)
    else:
        message = ""
    assert "\n" not in message
    for found in held.values():
        assert 0 <= found.offset <= found.offset + found.size_bytes <= len(content)


def test_the_written_bytes_are_the_golden_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {"a": b"\x01\x02", "b": b"\x00\x00\x80\x3f"}
    safetensors_file.write_streaming(path, [("a", "uint8", (2,)), ("b", "float32", (1,))], lambda name: [values[name]])
    assert path.read_bytes() == GOLDEN


def test_the_golden_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOLDEN)
    start = len(GOLDEN_HEADER)
    assert safetensors_file.read_header(path) == {
        "b": TensorEntry("b", "float32", (1,), path, start, 4),
        "a": TensorEntry("a", "uint8", (2,), path, start + 4, 2),
    }


def test_narrow_floats_are_named_as_ml_dtypes_names_them(tmp_path: Path) -> None:
    names = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    safetensors_file.write_sparse(tmp_path / "x", [(name, name, (3,)) for name in names])
    for name, found in safetensors_file.read_header(tmp_path / "x").items():
        assert found.dtype == np.dtype(getattr(ml_dtypes, name)).name
        assert found.size_bytes == 3 * np.dtype(getattr(ml_dtypes, name)).itemsize


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (b"[]", 0, r"begins with b'\[', it must begin with b'\{'"),
        (b"{nonsense}", 0, "header is not JSON"),
        (b'{"a": {"a": \xff}}', 0, "header is not JSON"),
        (b'{"a":' * 100_000, 0, "header is not JSON"),
        (b'{"a": 1, "a": 2}', 0, "has 'a' twice"),
        ({"a": 1}, 0, "tensor 'a' lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32"}}, 0, "tensor 'a' lacks dtype, shape or data_offsets"),
        ({"a": entry(dtype="F4")}, 8, "type 'F4', known are BOOL, U8"),
        ({"a": entry(shape=[-2])}, 8, r"shape \[-2\], a list of sizes is needed"),
        ({"a": entry(shape=[True])}, 8, r"shape \[True\]"),
        ({"a": entry(shape=[2.0])}, 8, r"shape \[2.0\]"),
        ({"a": entry(shape=[2**64, 0], offsets=(0, 0))}, 0, r"shape \[18446744073709551616, 0\]"),
        ({"a": entry(offsets=(8, 0))}, 8, r"data_offsets \[8, 0\], \[begin, end\] is needed"),
        ({"a": entry(offsets=(0, 4, 8))}, 8, r"data_offsets \[0, 4, 8\]"),
        ({"a": entry(offsets=(0, 4))}, 4, r"\(F32 \[2\]\) needs 8 bytes, but its data_offsets hold 4"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' begins at byte 4 of the data, .* ends at 8"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' begins at byte 12 of the data, .* ends at 8"),
        ({"a": entry(offsets=(4, 12))}, 12, "'a' begins at byte 4 of the data, .* ends at 0"),
        ({"a": entry()}, 7, r"has 7\d bytes, but its header describes 7\d; the file is damaged: download it again"),
        ({"a": entry()}, 9, r"has 7\d bytes, but its header describes 7\d; the file is damaged: download it again"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data_bytes: int, message: str) -> None:
    path = file_of(tmp_path / "x.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors_file.read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, a safetensors file has at least 8"),
        (struct.pack("<Q", 10) + b"{}", "header claims 10 bytes, but the file has 10"),
        (
            b"not a header at all",
            "claims [0-9,]+ bytes, .* allows 100,000,000; this is not a safetensors file",
        ),
    ],
)
def test_a_length_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.read_header(path)
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.header_sha256(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        safetensors_file.read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        safetensors_file.read_header(tmp_path)


def test_the_header_hash_ignores_values_and_sees_shapes(tmp_path: Path) -> None:
    hashes = []
    for number, (shape, data) in enumerate([([2], b"12345678"), ([2], b"87654321"), ([2, 1], b"12345678")]):
        path = file_of(tmp_path / str(number), {"a": entry(shape=shape)}, data)
        hashes.append(safetensors_file.header_sha256(path))
    assert hashes[0] == hashes[1] != hashes[2]
    content = (tmp_path / "0").read_bytes()
    assert hashes[0] == hashlib.sha256(content[:-8]).hexdigest()


def test_chunks_that_do_not_add_up_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor 'a' has 8 bytes, but its chunks held 4"):
        safetensors_file.write_streaming(tmp_path / "x", [("a", "float32", (2,))], lambda _: [b"1234"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"safetensors has no type complex128; convert to one of bool, uint8"):
        safetensors_file.write_streaming(tmp_path / "x", [("a", "complex128", (2,))], lambda _: [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to play a full disk")
def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        safetensors_file.write_streaming(tmp_path / "x", [("a", "uint8", (10**6,))], lambda _: [bytes(10**6)])
    assert not os.path.lexists(tmp_path / "x.part")

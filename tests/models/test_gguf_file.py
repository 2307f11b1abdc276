"""A .gguf file is read as gguf itself reads it, and a damaged one is refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models import gguf_file
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="needs gguf")

SMOLLM2 = Path("models/checkpoints/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def write_small(path: Path, split_count: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("llama.attention.head_count_kv", [3, 4])
    writer.add_token_list(["a", "b", "ü"])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    if split_count:
        writer.add_uint16("split.count", split_count)
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("plain.weight", values)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def agrees_with_gguf(path: Path) -> None:
    """Compare with gguf's own reader, tensor by tensor."""
    _, held = gguf_file.read_header(path)
    expected = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in expected] == list(held)
    for tensor in expected:
        entry = held[tensor.name]
        assert entry.dtype == tensor.tensor_type.name
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.offset, entry.size_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_small_file_is_read_as_gguf_reads_it(small: Path) -> None:
    agrees_with_gguf(small)


def test_metadata_comes_without_the_tokenizers_arrays(small: Path) -> None:
    metadata, _ = gguf_file.read_header(small)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.attention.head_count_kv"] == [3, 4]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert "tokenizer.ggml.tokens" not in metadata


def test_a_file_and_its_folder_open_alike(small: Path) -> None:
    by_file, by_folder = Checkpoint.open(small), Checkpoint.open(small.parent)
    assert by_file.kind == by_folder.kind == "gguf"
    assert by_file.tensors == by_folder.tensors
    assert by_file.files == by_folder.files == (small,)
    assert by_file.tensors["packed.weight"].dtype == "Q4_1"
    assert by_file.tensors["packed.weight"].size_bytes == 128 // 32 * 20


def test_another_magic_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<htm")
    with pytest.raises(CheckpointError, match=r"begins with b'<htm', a .gguf file with b'GGUF'; download it again"):
        Checkpoint.open(tmp_path / "x.gguf")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"begins with b''"):
        Checkpoint.open(tmp_path / "x.gguf")


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is one of 3 parts.*llama-gguf-split --merge"):
        Checkpoint.open(write_small(tmp_path / "x.gguf", split_count=3))


def test_truncated_anywhere_it_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    _, held = gguf_file.read_header(small)
    end = max(entry.offset + entry.size_bytes for entry in held.values())
    for length in range(4, end, 7):
        (tmp_path / "x.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"the file has [0-9,]+; the file is damaged: download it again"):
            gguf_file.read_header(tmp_path / "x.gguf")


@settings(max_examples=300, deadline=2000)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_it_gives_a_checkpoint_error_or_entries_inside_the_file(
    small: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(small.read_bytes())
    for at, value in changes:
        content[at % len(content)] = value
    path = tmp_path_factory.mktemp("t") / "x.gguf"
    path.write_bytes(content)
    try:
        _, held = gguf_file.read_header(path)
    except CheckpointError as error:
        held, message = {}, str(error)
    else:
        message = ""
    assert "\n" not in message
    for entry in held.values():
        assert 0 <= entry.offset <= entry.offset + entry.size_bytes <= len(content)


@pytest.mark.checkpoints
@pytest.mark.skipif(not SMOLLM2.is_file(), reason="needs the reference checkpoint: stageline models fetch smollm2")
def test_smollm2_is_read_as_gguf_reads_it() -> None:
    agrees_with_gguf(SMOLLM2)
    metadata, held = gguf_file.read_header(SMOLLM2)
    assert (metadata["general.architecture"], metadata["llama.block_count"]) == ("llama", 30)
    assert held["token_embd.weight"].shape == (49_152, 576)

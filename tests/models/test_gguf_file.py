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


def write_small(path: Path, architecture: str = "llama", **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_array("llama.attention.head_count_kv", [3, 4])
    writer.add_token_list(["a", "b", "ü"])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    for key, value in keys.items():
        writer.add_string(key.replace("_", ".", 1), str(value))
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("plain.weight", values)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_part(path: Path, number: int, count: int, total: int, name: str) -> Path:
    """Part `number`, from 0, as llama-gguf-split writes it: the metadata is in the first."""
    writer = gguf.GGUFWriter(path, "llama")
    if number == 0:
        writer.add_block_count(2)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    writer.add_tensor(name, np.full(4, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(folder: Path, count: int = 3, total: int | None = None) -> list[Path]:
    names = [folder / f"m-Q4_K-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    return [write_part(path, n, count, total or count, f"blk.{n}.weight") for n, path in enumerate(names)]


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
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    with pytest.raises(CheckpointError, match=r"begins with b'GGML', a .gguf file with b'GGUF'; download it again"):
        Checkpoint.open(tmp_path / "x.gguf")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"begins with b''"):
        Checkpoint.open(tmp_path / "x.gguf")


def test_a_split_model_opens_by_any_of_its_parts_and_by_its_folder(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    for path in (*parts, tmp_path):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.files == tuple(parts)
        assert {name: entry.file for name, entry in checkpoint.tensors.items()} == {
            f"blk.{number}.weight": part for number, part in enumerate(parts)
        }
        assert checkpoint.config["llama.block_count"] == 2


def test_a_missing_part_is_refused_by_name(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    parts[1].unlink()
    for path in (parts[0], tmp_path):
        with pytest.raises(
            CheckpointError, match=r"lacks 1 of 3 shards, such as 'm-Q4_K-00002-of-00003.gguf'; download"
        ):
            Checkpoint.open(path)


def test_a_folder_with_a_model_and_its_projector_opens_as_the_model(tmp_path: Path) -> None:
    write_small(tmp_path / "mmproj-model.gguf", "clip")
    with pytest.raises(CheckpointError, match="holds the projector"):
        Checkpoint.open(tmp_path)
    write_small(tmp_path / "model.gguf")
    assert Checkpoint.open(tmp_path).files == (tmp_path / "model.gguf",)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    write_part(parts[1], 2, 3, 3, "blk.1.weight")
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf says it is part 2 of 3 .* that it is 1 of 3"):
        Checkpoint.open(parts[0])
    write_part(parts[1], 1, 3, 3, "blk.0.weight")
    with pytest.raises(CheckpointError, match=r"holds 'blk.0.weight' once more; the parts are of different models"):
        Checkpoint.open(parts[0])
    with pytest.raises(CheckpointError, match=r"announces 7 tensors, its 3 parts hold 3"):
        Checkpoint.open(write_parts(tmp_path, total=7)[0])
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model.gguf is one of 3 parts, whose names end in -00001-of-0000N"):
        Checkpoint.open(renamed)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"general_type": "adapter"}, r"holds an adapter \(LoRA\), not a whole model; merge it"),
        ("llama", {"general_type": "imatrix"}, "holds an importance matrix"),
        ("clip", {}, "holds the projector of images or sound of a multimodal model; give the .gguf of its language"),
        ("controlvector", {}, "holds a control vector, not a model"),
    ],
)
def test_a_file_that_holds_no_model_is_refused_by_what_it_is(
    tmp_path: Path, architecture: str, keys: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write_small(tmp_path / "x.gguf", architecture, **keys))


def test_a_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(CheckpointError, match="holds no tensors, only a vocabulary"):
        Checkpoint.open(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("version", "message"), [(b"\x00\x00\x00\x03", "is big-endian"), (b"\x01\x00\x00\x00", "has GGUF version 1, known")]
)
def test_other_versions_are_refused(small: Path, tmp_path: Path, version: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + version + small.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / "x.gguf")


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

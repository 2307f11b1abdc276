"""bitsandbytes, against what the library itself packed and unpacked (golden.py made the file)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.packing.bitsandbytes import Bitsandbytes
from stageline.models.safetensors_file import read_header
from stageline.models.tensors import PackedEntry, Packing, TensorEntry, mapped

GOLDEN = read_header(Path(__file__).with_name("golden.safetensors"))


def tensors_of(case: str) -> tuple[dict[str, TensorEntry], NDArray[np.float32]]:
    prefix = f"bitsandbytes.{case}."
    tensors = {f"q.{name.removeprefix(prefix)}": entry for name, entry in GOLDEN.items() if name.startswith(prefix)}
    return tensors, mapped(tensors.pop("q.expected"))


def found(tensors: dict[str, TensorEntry]) -> PackedEntry:
    (one,) = Bitsandbytes().find({}, tensors)
    entry = PackedEntry(one.name, Packing(one.method, one.settings, one.shape, "bfloat16"), one.parts)
    packing.check(entry.packing, {role: (part.dtype, part.shape) for role, part in entry.parts.items()})
    return entry


@pytest.mark.parametrize("case", ["nf4", "nf4_nested", "fp4"])
def test_four_bits_are_those_of_the_library(case: str) -> None:
    tensors, expected = tensors_of(case)
    entry = found(tensors)
    assert (entry.name, entry.shape) == ("q.weight", expected.shape)
    assert {part.name for part in entry.parts.values()} == {part.name for part in tensors.values()}
    np.testing.assert_array_equal(packing.dequantised(entry.packing, packing.read(entry)), expected)
    assert packing.groups(entry.packing, packing.read(entry)) is None


def test_rows_of_int8_are_those_of_the_library() -> None:
    tensors, expected = tensors_of("int8")
    entry = found(tensors)
    arrays = packing.read(entry)
    np.testing.assert_allclose(packing.dequantised(entry.packing, arrays), expected, rtol=3e-7)
    groups = packing.groups(entry.packing, arrays)
    assert groups is not None
    assert (groups.bits, groups.group) == (8, expected.shape[1])
    values = groups.values.astype(np.float32) * groups.scales + groups.offsets
    np.testing.assert_allclose(values, expected, rtol=2e-5)  # 128 scales are taken off again


def test_the_last_block_may_be_short() -> None:
    rng = np.random.default_rng(0)
    table, absmax = rng.normal(size=16).astype(np.float32), rng.uniform(size=2).astype(np.float32)
    numbers = rng.integers(0, 16, 100)
    arrays = {"weight": (numbers[0::2] << 4 | numbers[1::2]).astype(np.uint8)[:, None], "quant_map": table}
    packed = Packing("bitsandbytes", {"type": "nf4", "blocksize": 64, "nested_blocksize": 0}, (5, 20), "bfloat16")
    expected = table[numbers] * np.repeat(absmax, 64)[:100]
    np.testing.assert_array_equal(packing.dequantised(packed, {**arrays, "absmax": absmax}), expected.reshape(5, 20))


def rewritten(tensors: dict[str, TensorEntry], folder: Path, state: Any) -> dict[str, TensorEntry]:
    """The same with another quant_state."""
    file = folder / "state"
    text = state if isinstance(state, bytes) else json.dumps(state).encode()
    file.write_bytes(text)
    name = next(name for name in tensors if "quant_state" in name)
    return {**tensors, name: TensorEntry(name, "uint8", (len(text),), file, 0, len(text))}


STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [16, 32]}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (b"\xff\x00", "its quant_state is not JSON; download it again"),
        ([1], "its quant_state is no JSON object; download it again"),
        ({**STATE, "shape": None}, "q.weight.quant_state.bitsandbytes__nf4 has the shape None, a list of sizes"),
        ({**STATE, "shape": [16, 33]}, "its weight is uint8 [256, 1], uint8 [264, 1] is needed"),
        ({**STATE, "blocksize": 32}, "its absmax is float32 [8], float32 [16] is needed"),
        ({**STATE, "blocksize": 0}, "it has blocks of 0 and nested ones of 0, even sizes are needed"),
        ({**STATE, "quant_type": "nf5"}, "it has the type 'nf5', read are nf4, fp4, int8"),
        ({**STATE, "nested_blocksize": 256}, "its absmax is float32 [8], uint8 [8] is needed"),
    ],
)
def test_a_state_that_lies_is_refused(tmp_path: Path, state: Any, said: str) -> None:
    tensors, _ = tensors_of("nf4")
    with pytest.raises(CheckpointError) as error:
        found(rewritten(tensors, tmp_path, state))
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("nf4", "weight.quant_map"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4"),
        ("nf4_nested", "weight.nested_absmax"),
        ("nf4", "weight"),
        ("int8", "weight"),
    ],
)
def test_a_missing_part_is_named(case: str, part: str) -> None:
    tensors, _ = tensors_of(case)
    del tensors[f"q.{part}"]
    with pytest.raises(
        CheckpointError, match=f"{part.removesuffix('.bitsandbytes__nf4').rpartition('.')[2]}.* is missing"
    ):
        found(tensors)


def test_int8_in_an_order_of_its_own_is_refused(tmp_path: Path) -> None:
    tensors, expected = tensors_of("int8")
    for form, wrong in ((0, False), (1, True)):
        (tmp_path / "form").write_bytes(bytes([form]))
        tensors["q.weight_format"] = TensorEntry("q.weight_format", "uint8", (), tmp_path / "form", 0, 1)
        if wrong:
            with pytest.raises(CheckpointError, match=r"q\.weight is in an order of columns of its own"):
                found(tensors)
        else:
            assert found(tensors).shape == expected.shape

"""compressed-tensors, against what the library itself packed and unpacked (golden.py made the file)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.packing.compressed_tensors import CompressedTensors
from stageline.models.safetensors_file import read_header
from stageline.models.tensors import PackedEntry, Packing, TensorEntry, mapped

GOLDEN = read_header(Path(__file__).with_name("golden.safetensors"))
# case -> what a config.json states of its weights
WHOLE: dict[str, dict[str, Any]] = {
    "int4_group": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "int4_asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "int8_channel": {"num_bits": 8, "strategy": "channel", "group_size": -1},
    "int3_channel": {"num_bits": 3, "strategy": "channel", "symmetric": False},
    "int2_group": {"num_bits": 2, "group_size": 16, "symmetric": False},
    "int4_narrow": {"num_bits": 4, "group_size": -1, "symmetric": False},
    "w8a8": {"num_bits": 8, "strategy": "channel"},
    "w8a8_asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "w8a8_tensor": {"num_bits": 8, "strategy": "tensor"},
}
FLOATS: dict[str, dict[str, Any]] = {
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}


def stored(case: str) -> tuple[PackedEntry, NDArray[np.float32]]:
    """The weight as it is found under the name q.weight, and the library's values."""
    prefix = f"compressed_tensors.{case}."
    tensors = {f"q.{name.removeprefix(prefix)}": entry for name, entry in GOLDEN.items() if name.startswith(prefix)}
    expected = mapped(tensors.pop("q.expected"))
    scheme = {"targets": ["Linear"], "weights": (WHOLE | FLOATS)[case]}
    (found,) = CompressedTensors().find({"config_groups": {"group_0": scheme}}, tensors)
    assert found.name == "q.weight"
    entry = PackedEntry("q.weight", Packing("compressed-tensors", found.settings, found.shape, "bfloat16"), found.parts)
    packing.check(entry.packing, {role: (part.dtype, part.shape) for role, part in entry.parts.items()})
    return entry, expected


@pytest.mark.parametrize("case", WHOLE | FLOATS)
def test_values_are_those_of_the_library(case: str) -> None:
    entry, expected = stored(case)
    np.testing.assert_array_equal(packing.dequantised(entry.packing, packing.read(entry)), expected)


@pytest.mark.parametrize("case", WHOLE)
def test_whole_numbers_scales_and_offsets_give_those_values(case: str) -> None:
    entry, expected = stored(case)
    found = packing.groups(entry.packing, packing.read(entry))
    assert found is not None
    assert found.zeros is not None
    assert found.bits == WHOLE[case]["num_bits"]
    assert found.values.max() < 2**found.bits
    columns = np.arange(expected.shape[1]) // found.group
    values = found.values.astype(np.float32) * found.scales[:, columns] + found.offsets[:, columns]
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("case", FLOATS)
def test_floats_are_no_groups(case: str) -> None:
    entry, _ = stored(case)
    assert packing.groups(entry.packing, packing.read(entry)) is None


def test_inputs_in_an_order_of_their_own() -> None:
    entry, expected = stored("int4_asymmetric")
    arrays = packing.read(entry)
    group_of = np.random.default_rng(0).permutation(np.arange(32) // 16).astype(np.int32)
    found = packing.groups(entry.packing, {**arrays, "weight_g_idx": group_of})
    assert found is not None
    assert found.order is not None
    one_group = [packing.dequantised(entry.packing, {**arrays, "weight_g_idx": np.full(32, g)}) for g in (0, 1)]
    np.testing.assert_array_equal(found.weight(), np.where(group_of == 0, *one_group))
    unset = packing.dequantised(entry.packing, {**arrays, "weight_g_idx": np.full(32, -1, np.int32)})
    np.testing.assert_array_equal(unset, expected)


def test_a_zero_point_of_the_whole_tensor_is_not_packed() -> None:
    entry, _ = stored("int4_group")
    packed = changed(entry, block_rows=-1, block_columns=-1)
    arrays = {"weight_packed": packing.read(entry)["weight_packed"], "weight_scale": np.array([0.5], np.float32)}
    for shape in ((1,), (1, 1), ()):
        zero = np.full(shape, 3, np.int8)
        packing.check(
            packed, {role: (a.dtype.name, a.shape) for role, a in {**arrays, "weight_zero_point": zero}.items()}
        )
        values = packing.dequantised(packed, {**arrays, "weight_zero_point": zero})
        np.testing.assert_array_equal(values, packing.dequantised(packed, arrays) - 1.5)


def changed(entry: PackedEntry, **settings: Any) -> Packing:
    packed = entry.packing
    return Packing(packed.method, {**packed.settings, **settings}, packed.shape, packed.dtype)


@pytest.mark.parametrize(
    ("case", "part", "shape", "settings", "said"),
    [
        ("int4_group", "weight_packed", (16, 3), {}, "its weight_packed is int32 [16, 3], int32 [16, 4] is needed"),
        ("int4_group", "weight_scale", (16, 1), {}, "its weight_scale is bfloat16 [16, 1], float16 or bfloat16 or"),
        ("int4_group", None, (), {"bits": 8}, "its weight_packed is int32 [16, 4], int32 [16, 8] is needed"),
        ("int4_group", None, (), {"bits": 9}, "it has 9 bits, read are 2, 3, 4, 5, 6, 7, 8"),
        ("int4_group", None, (), {"format": "marlin-24"}, "it has the format 'marlin-24', read are pack-quantized"),
        ("int4_group", None, (), {"block_columns": 0}, "it has the block_columns 0, a positive number or -1"),
        ("int4_asymmetric", "weight_zero_point", (2, 1), {}, "its weight_zero_point is int32 [2, 1], int32 [2, 2]"),
        ("w8a8", "weight_scale", (4,), {}, "its weight_scale is bfloat16 [4], float16 or bfloat16 or float32 [16, 1]"),
        ("nvfp4", "weight_scale", (16, 1), {}, "its weight_scale is float8_e4m3fn [16, 1], float8_e4m3fn [16, 2]"),
        ("fp8_block", "weight_scale", (4, 1), {}, "its weight_scale is float32 [4, 1], float16 or bfloat16 or"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    case: str, part: str | None, shape: tuple[int, ...], settings: Any, said: str
) -> None:
    entry, _ = stored(case)
    parts = {role: (held.dtype, shape if role == part else held.shape) for role, held in entry.parts.items()}
    with pytest.raises(CheckpointError) as error:
        packing.check(changed(entry, **settings), parts)
    assert str(error.value).startswith(said)


def test_bytes_of_more_bits_than_stated_are_refused() -> None:
    entry, _ = stored("w8a8")
    with pytest.raises(CheckpointError, match=r"its weight holds -\d+ to \d+, which are not of 4 bits; correct"):
        packing.groups(changed(entry, bits=4), packing.read(entry))


def scheme(*targets: str, bits: int) -> dict[str, Any]:
    return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}


def test_a_layer_has_the_group_that_names_it() -> None:
    prefix = "compressed_tensors.int8_channel."
    held = {name.removeprefix(prefix): entry for name, entry in GOLDEN.items() if name.startswith(prefix)}
    tensors: dict[str, TensorEntry] = {}
    for layer in ("a.q", "a.down", "b.gate"):
        tensors |= {f"{layer}.{name}": entry for name, entry in held.items()}
    groups = {"0": scheme("Linear", bits=4), "1": scheme("re:.*down$", bits=8), "2": scheme("b.gate", bits=2)}
    found = {
        entry.name: entry.settings["bits"] for entry in CompressedTensors().find({"config_groups": groups}, tensors)
    }
    assert found == {"a.q.weight": 4, "a.down.weight": 8, "b.gate.weight": 2}
    with pytest.raises(CheckpointError, match=r"no group of its config_groups targets a\.q"):
        list(CompressedTensors().find({"config_groups": {"1": groups["1"]}}, tensors))


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"format": "pack-quantized"}, None),
        ({"format": "marlin-24"}, ""),
        ({"format": "pack-quantized", "config_groups": None}, "without config_groups"),
        ({"format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}, "without config_groups"),
        ({"format": "pack-quantized", "config_groups": {"0": {"targets": ["Linear"]}}}, "without quantised weights"),
        ({"format": "pack-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}}, "and sparse"),
        ({"format": "pack-quantized", "sparsity_config": {"format": "dense"}}, None),
        ({"format": "pack-quantized", "transform_config": {"config_groups": {}}}, "with transforms"),
    ],
)
def test_what_is_not_read_is_said(stated: dict[str, Any], said: str | None) -> None:
    assert CompressedTensors().unread({"config_groups": {"0": scheme("Linear", bits=4)}, **stated}) == said

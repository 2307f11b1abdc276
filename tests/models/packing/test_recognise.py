"""A checkpoint's quantised weights are found by what its config.json states, and refused where the tensors say else."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models import packing
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.quantisation import check_plain
from stageline.models.safetensors_file import write_streaming
from stageline.models.tensors import PackedEntry, TensorEntry, same_data

Tensors = dict[str, tuple[str, tuple[int, ...]]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
GPTQ_TENSORS: Tensors = {
    "q.qweight": ("int32", (8, 16)),
    "q.qzeros": ("int32", (2, 2)),
    "q.scales": ("float16", (2, 16)),
    "q.g_idx": ("int32", (64,)),
}
PLAIN: Tensors = {"norm.weight": ("bfloat16", (16,)), "q.bias": ("bfloat16", (16,))}
FP8 = ("float8_e4m3fn", (16, 64))
ITEMSIZE = {"int32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "int64": 8}


def write(folder: Path, stated: dict[str, Any] | None, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of zeros."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": stated, **(config or {})}))

    def zeros(name: str) -> list[bytes]:
        dtype, shape = tensors[name]
        size = ITEMSIZE.get(dtype, 1)
        for each in shape:
            size *= each
        return [bytes(size)]

    write_streaming(folder / "model.safetensors", [(n, d, s) for n, (d, s) in tensors.items()], zeros)
    return folder


def packed(checkpoint: Checkpoint, name: str) -> PackedEntry:
    entry = checkpoint.tensors[name]
    assert isinstance(entry, PackedEntry)
    return entry


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: spec for name, spec in tensors.items() if name not in names}


def test_a_weight_stands_in_place_of_its_parts(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, GPTQ, GPTQ_TENSORS | PLAIN, {"torch_dtype": "bfloat16"}))
    check_plain(checkpoint)
    assert set(checkpoint.tensors) == {"q.weight", "norm.weight", "q.bias"}
    assert set(checkpoint.stored) == {*GPTQ_TENSORS, *PLAIN}
    entry = packed(checkpoint, "q.weight")
    assert (entry.packing.method, entry.shape, entry.dtype) == ("gptq", (16, 64), "bfloat16")
    assert dict(entry.packing.settings) == {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    assert {role: part.name for role, part in entry.parts.items()} == {
        role: f"q.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert entry.size_bytes == 8 * 16 * 4 + 2 * 2 * 4 + 2 * 16 * 2 + 64 * 4
    assert packing.dequantised(entry.packing, packing.read(entry)).shape == (16, 64)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({"text_config": {"torch_dtype": "float32"}}, "float32")],
)
def test_its_type_is_that_of_the_config_or_of_its_scales(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    assert packed(Checkpoint.open(write(tmp_path, GPTQ, GPTQ_TENSORS, config)), "q.weight").dtype == dtype


@pytest.mark.parametrize(
    ("stated", "tensors", "method", "shape", "roles"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
            {"q.qweight": ("int32", (64, 2)), "q.qzeros": ("int32", (2, 2)), "q.scales": ("float16", (2, 16))},
            "awq", (16, 64), {"qweight", "qzeros", "scales"},
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 32]},
            {"q.weight": FP8, "q.weight_scale_inv": ("float32", (2, 2))},
            "fp8", (16, 64), {"weight", "scale"},
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            {"q.weight": FP8, "q.weight_scale": ("bfloat16", ()), "q.input_scale": ("float32", ())},
            "fp8", (16, 64), {"weight", "scale"},
        ),
        (
            {"quant_method": "fbgemm_fp8"},
            {"q.weight": FP8, "q.weight_scale": ("float32", (16, 1))},
            "fp8", (16, 64), {"weight", "scale"},
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            {"q.weight": FP8, "q.weight_scale": ("float32", ()), "q.k_scale": ("float32", ())},
            "fp8", (16, 64), {"weight", "scale"},
        ),
        (
            {
                "quant_method": "compressed-tensors", "format": "int-quantized",
                "config_groups": {"0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
            },
            {"q.weight": ("int8", (16, 64)), "q.weight_scale": ("bfloat16", (16, 1)), "q.input_scale": ("float32", ())},
            "compressed-tensors", (16, 64), {"weight", "weight_scale"},
        ),
    ],
)  # fmt: skip
def test_methods_that_are_read(
    tmp_path: Path, stated: dict[str, Any], tensors: Tensors, method: str, shape: tuple[int, ...], roles: set[str]
) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, stated, tensors | PLAIN))
    check_plain(checkpoint)
    assert set(checkpoint.tensors) == {"q.weight", *PLAIN}
    entry = packed(checkpoint, "q.weight")
    assert (entry.packing.method, entry.shape, set(entry.parts)) == (method, shape, roles)
    assert packing.dequantised(entry.packing, packing.read(entry)).shape == shape


def test_layers_with_bits_of_their_own(tmp_path: Path) -> None:
    eight: Tensors = {
        "d.qweight": ("int32", (16, 16)),
        "d.qzeros": ("int32", (1, 4)),
        "d.scales": ("float16", (1, 16)),
        "d.g_idx": ("int32", (64,)),
    }
    stated = {**GPTQ, "dynamic": {"+:d": {"bits": 8, "group_size": -1}}}
    checkpoint = Checkpoint.open(write(tmp_path, stated, GPTQ_TENSORS | eight))
    found = {name: packed(checkpoint, name).packing.settings for name in ("q.weight", "d.weight")}
    assert [(s["bits"], s["group_size"]) for s in found.values()] == [(4, 32), (8, 64)]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({**GPTQ, "bits": 6}, "gptq (6 bits, groups of 32)"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "gptq (4 bits, groups of 32) in the format marlin"),
        ({**GPTQ, "is_marlin_format": True}, "gptq (4 bits, groups of 32) in the format marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq (4 bits) in the version gemv"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "awq (4 bits) in the version llm-awq"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "awq (4 bits) without zero points"),
        ({"quant_method": "awq", "version": "GEMM"}, "awq without a number of bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt (W4A8_AWQ)"),
    ],
)
def test_a_kind_that_is_not_read_is_refused_and_its_tensors_stay(
    tmp_path: Path, stated: dict[str, Any], said: str
) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, stated, GPTQ_TENSORS))
    assert all(isinstance(entry, TensorEntry) for entry in checkpoint.tensors.values())
    with pytest.raises(CheckpointError) as error:
        check_plain(checkpoint)
    assert f"is quantised with {said}, which is not read yet; export the unquantised" in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without(GPTQ_TENSORS, "q.scales"), "its scales is missing"),
        (without(GPTQ_TENSORS, "q.qzeros"), "its qzeros is missing"),
        (GPTQ_TENSORS | {"q.scales": ("float16", (1, 16))}, "its scales is float16 [1, 16], float16 or bfloat16 or"),
        (GPTQ_TENSORS | {"q.qweight": ("int32", (7, 16))}, "its g_idx is int32 [64], int32 or int64 [56] is needed"),
        (GPTQ_TENSORS | {"q.qweight": ("int32", (16, 16))}, "its qzeros is int32 [2, 2], int32 [4, 2] is needed"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, tensors: Tensors, said: str) -> None:
    folder = write(tmp_path, GPTQ, tensors)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    text = str(error.value)
    assert text.startswith(f"{folder} is quantised with gptq (4 bits, groups of 32), but q.weight ")
    assert f"does not fit that: {said}" in text
    assert "\n" not in text


def test_a_config_that_lies_about_the_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gptq \(8 bits, groups of 32\), but q\.weight \[16, 32\] does not fit"):
        Checkpoint.open(write(tmp_path, {**GPTQ, "bits": 8}, GPTQ_TENSORS))


def test_a_packed_matrix_of_another_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q\.qweight has the shape \[128\], a matrix is needed"):
        Checkpoint.open(write(tmp_path, GPTQ, GPTQ_TENSORS | {"q.qweight": ("int32", (128,))}))


def test_config_json_outweighs_the_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path, GPTQ, GPTQ_TENSORS)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 2, "group_size": 128}))
    assert packed(Checkpoint.open(tmp_path), "q.weight").packing.settings["bits"] == 4


def test_quantised_weights_are_the_same_if_all_their_parts_are(tmp_path: Path) -> None:
    one = packed(Checkpoint.open(write(tmp_path / "1", GPTQ, GPTQ_TENSORS)), "q.weight")
    two = packed(Checkpoint.open(write(tmp_path / "2", GPTQ, GPTQ_TENSORS)), "q.weight")
    assert same_data(one, two)
    part = two.parts["scales"]
    data = bytearray(part.file.read_bytes())
    data[part.offset] ^= 1
    part.file.write_bytes(data)
    assert not same_data(one, two)
    assert not same_data(one, part)
    assert not same_data(part, one)

"""What states a quantisation is found, whichever file it is in, and named with its details."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models.errors import CheckpointError
from stageline.models.packing.stated import details, statements


def said(folder: Path, config: dict[str, Any], **files: Any) -> str:
    """The first statement of this config.json and these files beside it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    method, values = statements(config, folder)[0]
    how = details(values)
    return f"{method} ({how})" if how else method


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq (4 bits, groups of 128)"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq (8 bits)"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "awq (4 bits, groups of 64)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes (8 bits)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes (4 bits, nf4)"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "type": "int"}}},
            },
            "compressed-tensors (4 bits, groups of 128, pack-quantized)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (NVFP4)"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto (int8)"),
        ({"quant_method": "of-tomorrow", "bits": [1, 2], "group_size": None}, "of-tomorrow"),
        ({"zero_point": True}, "a method that config.json does not name"),
    ],
)
def test_what_config_json_states_is_said(tmp_path: Path, stated: dict[str, Any], method: str) -> None:
    assert said(tmp_path, {"quantization_config": stated}) == method


@pytest.mark.parametrize(
    ("config", "files", "method"),
    [
        ({"compression_config": {"format": "dense"}}, {}, "compressed-tensors (dense)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, {}, "mlx (4 bits, groups of 64)"),
        ({"quantization_config": {"group_size": 32, "bits": 8}}, {}, "mlx (8 bits, groups of 32)"),
        ({"text_config": {"quantization_config": {"quant_method": "fbgemm_fp8"}}}, {}, "fbgemm_fp8"),
        ({}, {"quantize_config": {"bits": 4, "group_size": 128}}, "gptq (4 bits, groups of 128)"),
        ({}, {"quant_config": {"w_bit": 4, "q_group_size": 128}}, "awq (4 bits, groups of 128)"),
        (
            {},
            {"hf_quant_config": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}},
            "modelopt (FP8)",
        ),
    ],
)
def test_other_places_that_state_a_quantisation(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], method: str
) -> None:
    assert said(tmp_path, config, **files) == method


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_nothing_is_stated(tmp_path: Path, config: dict[str, Any]) -> None:
    assert statements(config, tmp_path) == []


def test_a_file_beside_it_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quant_config\.json is not JSON"):
        statements({}, tmp_path)

"""A quantised checkpoint is refused by the name of its method, whichever file states it."""

import json
from pathlib import Path
from typing import Any

import pytest
from stageline.models import synthetic
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.quantisation import check_plain, is_narrow, quantised_with


def refusal(folder: Path, config: dict[str, Any], **files: Any) -> str:
    """What is said of a checkpoint with this config.json and these files beside it; empty if nothing."""
    synthetic.write_random(folder / "c", {"model_type": "llama", **config}, {"w": ("bfloat16", (2, 2))}, seed=1)
    for name, content in files.items():
        (folder / "c" / f"{name}.json").write_text(json.dumps(content))
    try:
        check_plain(Checkpoint.open(folder / "c"))
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder / 'c'} ")
    return ""


READ = {"fp8", "fbgemm_fp8", "bitsandbytes", "mxfp4"}
"""Those that say nothing more in config.json."""
PLAIN = "which is not read yet; export the unquantised checkpoint, or a .gguf of it"


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto (int8)"),
        ({"quant_method": "of-tomorrow", "bits": [1, 2], "group_size": None}, "of-tomorrow"),
        ({"group_size": 32, "bits": 8}, "mlx (8 bits, groups of 32)"),
        ({"quant_method": "gptq", "bits": 7}, "gptq (7 bits)"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"0": {}}},
            "compressed-tensors (marlin-24)",
        ),
    ],
)
def test_a_method_that_is_not_read_is_refused_by_its_name(tmp_path: Path, stated: dict[str, Any], method: str) -> None:
    assert refusal(tmp_path, {"quantization_config": stated}) == f"is quantised with {method}, {PLAIN}"


def test_every_method_of_transformers_is_read_or_refused_by_name(tmp_path: Path) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    for number, method in enumerate(QuantizationMethod):
        folder = tmp_path / str(number)
        folder.mkdir()
        said = refusal(folder, {"quantization_config": {"quant_method": method.value}})
        assert f"is quantised with {method.value}" in said or method.value in READ


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_plain_checkpoints_pass(tmp_path: Path, config: dict[str, Any]) -> None:
    assert not refusal(tmp_path, config)


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["q_proj.weight", "q_proj.SCB"], "bitsandbytes"),
        (["q_proj.qweight", "q_proj.qzeros", "q_proj.scales", "q_proj.g_idx"], "gptq"),
        (["q_proj.qweight", "q_proj.qzeros", "q_proj.scales"], "gptq or awq"),
        (["q_proj.weight", "q_proj.scales", "q_proj.biases"], "mlx"),
        (["q_proj.weight_packed", "q_proj.weight_scale", "q_proj.weight_shape"], "compressed-tensors"),
        (["q_proj.weight", "q_proj.weight_scale_inv"], "fp8"),
        (["experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"], "mxfp4"),
        (["q_proj.weight", "q_proj.bias"], None),
    ],
)
def test_tensors_tell_the_method(names: list[str], method: str | None) -> None:
    assert quantised_with(names) == method


def test_narrow_floats_are_told_from_weights() -> None:
    narrow = [
        name
        for name in ("float8_e4m3fn", "float8_e8m0fnu", "float16", "bfloat16", "float64", "int8")
        if is_narrow(name)
    ]
    assert narrow == ["float8_e4m3fn", "float8_e8m0fnu"]

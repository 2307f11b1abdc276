"""4-bit floats, against transformers' dequantiser (MXFP4) and compressed-tensors' file of the same numbers (NVFP4)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stageline.models import packing
from stageline.models.errors import CheckpointError
from stageline.models.packing.fp4 import Mxfp4
from stageline.models.packing.modelopt import ModelOpt
from stageline.models.safetensors_file import read_header
from stageline.models.tensors import Packing, TensorEntry, mapped

EXPERTS, INPUTS, OUTPUTS = 3, 64, 10


def experts() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "blocks": rng.integers(0, 256, (EXPERTS, OUTPUTS, INPUTS // 32, 16), dtype=np.uint8),
        "scales": rng.integers(110, 130, (EXPERTS, OUTPUTS, INPUTS // 32), dtype=np.uint8),
    }


def test_experts_are_those_of_transformers() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    arrays = experts()
    tensors = {
        f"experts.gate_up_proj_{role}": TensorEntry(f"experts.gate_up_proj_{role}", "uint8", a.shape, Path(), 0, a.size)
        for role, a in arrays.items()
    }
    (found,) = Mxfp4().find({}, tensors)
    assert (found.name, found.shape) == ("experts.gate_up_proj", (EXPERTS, INPUTS, OUTPUTS))
    packed = Packing(found.method, found.settings, found.shape, "bfloat16")
    packing.check(packed, {role: (part.dtype, part.shape) for role, part in found.parts.items()})
    expected = convert_moe_packed_tensors(
        torch.from_numpy(arrays["blocks"]), torch.from_numpy(arrays["scales"]), dtype=torch.float32
    )
    np.testing.assert_array_equal(packing.dequantised(packed, arrays), expected.numpy())
    assert packing.groups(packed, arrays) is None


def test_nvfp4_of_modelopt_multiplies_by_the_scale_of_scales() -> None:
    golden = read_header(Path(__file__).with_name("golden.safetensors"))
    prefix = "compressed_tensors.nvfp4."
    held = {name.removeprefix(prefix): mapped(entry) for name, entry in golden.items() if name.startswith(prefix)}
    arrays = {
        "weight": held["weight_packed"],
        "weight_scale": held["weight_scale"],
        "weight_scale_2": 1 / held["weight_global_scale"],
    }
    rows, columns = held["expected"].shape
    tensors = {f"q.{role}": TensorEntry(role, a.dtype.name, a.shape, Path(), 0, a.nbytes) for role, a in arrays.items()}
    (found,) = ModelOpt().find({}, tensors)
    assert (found.name, found.method, found.shape) == ("q.weight", "nvfp4", (rows, columns))
    packed = Packing(found.method, found.settings, found.shape, "bfloat16")
    packing.check(packed, {role: (part.dtype, part.shape) for role, part in found.parts.items()})
    np.testing.assert_allclose(packing.dequantised(packed, arrays), held["expected"], rtol=3e-7)


def test_modelopt_of_both_kinds_or_neither() -> None:
    assert ModelOpt().unread({"quant_algo": "NVFP4"}) is None
    assert ModelOpt().unread({"quantization": {"quant_algo": "FP8"}}) is None
    assert ModelOpt().unread({"quant_algo": "W4A8_AWQ"}) == ""
    assert ModelOpt().unread({}) == ""


@pytest.mark.parametrize(
    ("method", "shape", "parts", "said"),
    [
        (
            "mxfp4",
            (3, 64, 10),
            {"blocks": ("uint8", (3, 10, 2, 15))},
            "its blocks is uint8 [3, 10, 2, 15], uint8 [3, 10",
        ),
        ("mxfp4", (3, 64, 10), {"blocks": ("uint8", (3, 10, 2, 16))}, "its scales is missing"),
        ("mxfp4", (64, 10), {}, "it has the shape [64, 10], [experts, inputs, outputs] is needed"),
        ("nvfp4", (10, 60), {}, "its 60 inputs are no multiple of 16"),
        ("nvfp4", (10, 64), {"weight": ("uint8", (10, 31))}, "its weight is uint8 [10, 31], uint8 [10, 32] is needed"),
    ],
)
def test_parts_that_do_not_fit_are_refused(method: str, shape: tuple[int, ...], parts: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        packing.check(Packing(method, {}, shape, "bfloat16"), parts)
    assert str(error.value).startswith(said)

"""Checkpoints of every method that is read: each weight has the values that were stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import quantised
import torch
from safetensors.torch import save_file
from stageline.models import packing
from stageline.models.checkpoint import Checkpoint
from stageline.models.quantisation import check_plain
from stageline.models.tensors import PackedEntry

SHAPES = {"model.layers.0.mlp.up_proj": (256, 128), "model.layers.0.mlp.down_proj": (128, 384)}


@pytest.mark.parametrize("method", quantised.METHODS)
def test_every_weight_has_the_values_that_were_stored(method: str, tmp_path: Path) -> None:
    store, stated = quantised.METHODS[method]
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {"model.norm.weight": torch.ones(128, dtype=torch.bfloat16)}, {}
    for module, shape in SHAPES.items():
        parts, expected[f"{module}.weight"] = store(torch.randn(shape, generator=generator) * 0.05)
        tensors |= {f"{module}.{part}": tensor.clone() for part, tensor in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": stated}))
    checkpoint = Checkpoint.open(tmp_path)
    check_plain(checkpoint)
    assert checkpoint.tensors.keys() == {"model.norm.weight", *expected}
    assert checkpoint.stored.keys() == tensors.keys()
    for name, values in expected.items():
        entry = checkpoint.tensors[name]
        assert isinstance(entry, PackedEntry)
        assert (entry.shape, entry.dtype) == (values.shape, "bfloat16")
        read = packing.dequantised(entry.packing, packing.read(entry))
        np.testing.assert_allclose(read, values.numpy(), rtol=3e-7, atol=0, err_msg=name)

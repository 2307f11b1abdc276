"""Checkpoints of every method that is read: each weight has the values that were stored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised
import torch
from safetensors.torch import save_file
from stageline.models import packing
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.quantisation import check_plain
from stageline.models.tensors import PackedEntry

SHAPES = {"model.layers.0.mlp.up_proj": (256, 128), "model.layers.0.mlp.down_proj": (128, 384)}


def write(folder: Path, method: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a checkpoint, and the values of its weights."""
    store, stated = quantised.METHODS[method]
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {"model.norm.weight": torch.ones(128, dtype=torch.bfloat16)}, {}
    for module, shape in SHAPES.items():
        parts, expected[f"{module}.weight"] = store(torch.randn(shape, generator=generator) * 0.05)
        tensors |= {f"{module}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": stated}))
    return tensors, expected


@pytest.mark.parametrize("method", quantised.METHODS)
def test_every_weight_has_the_values_that_were_stored(method: str, tmp_path: Path) -> None:
    tensors, expected = write(tmp_path, method)
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


@pytest.mark.parametrize("method", quantised.METHODS)
def test_settings_and_shapes_from_elsewhere_are_checked(method: str, tmp_path: Path) -> None:
    """As from the manifest of a bundle."""
    write(tmp_path, method)
    entry = Checkpoint.open(tmp_path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(entry, PackedEntry)
    packed, parts = entry.packing, {role: (part.dtype, part.shape) for role, part in entry.parts.items()}
    packing.check(packed, parts)
    for name in packed.settings:
        for value in (None, "x", -7):
            settings: Any = {**packed.settings, name: value}
            with pytest.raises(CheckpointError):
                packing.check(replace(packed, settings=settings), parts)
    for shape in ((), (256,), (256, 0), (129, 256), (2, 256, 128), (256, 129)):
        with pytest.raises(CheckpointError):
            packing.check(replace(packed, shape=shape), parts)

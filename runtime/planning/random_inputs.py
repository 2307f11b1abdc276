"""Inputs of a whole model for measuring: full rows of random tokens or pixels."""

import numpy as np
from stageline.runtime.bundle.manifest import LOGITS_AT, NEW_LENGTHS, PAST_LENGTHS, ROW_LENGTHS, Manifest
from stageline.runtime.devices.base import Array
from stageline.runtime.workload import Shape


def random_inputs(manifest: Manifest, shape: Shape) -> dict[str, Array]:
    """The model's inputs by name, for a micro-batch of this shape: the same ones each time."""
    random = np.random.default_rng(0)
    sizes = shape.sizes()
    known = {
        "attention_mask": 1,
        "token_type_ids": 0,
        PAST_LENGTHS: shape.past,
        NEW_LENGTHS: shape.length,
        ROW_LENGTHS: shape.past + shape.length,
    }
    values: dict[str, Array] = {}
    for spec in manifest.inputs:
        dims = [d if isinstance(d, int) else sizes.get(d, 64) for d in spec.shape]
        if spec.name in known:
            values[spec.name] = np.full(dims, known[spec.name], spec.dtype)
        elif spec.name == LOGITS_AT:
            last = np.arange(shape.length - dims[1], shape.length)
            values[spec.name] = np.broadcast_to(last, dims).astype(spec.dtype)
        elif spec.dtype.startswith("int"):
            values[spec.name] = random.integers(0, manifest.vocabulary or 2, dims).astype(spec.dtype)
        else:
            values[spec.name] = random.standard_normal(dims).astype("float32")
    return values

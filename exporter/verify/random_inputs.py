"""Random inputs of a model, for comparing what computes it."""

import numpy as np
from stageline.runtime.bundle.manifest import BATCH, LENGTH, Manifest
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array

_ROWS, _LENGTH = 5, 33


def random_inputs(manifest: Manifest, seed: int) -> dict[str, Array]:
    """Inputs of the model: ragged rows of random tokens padded on the right (one full, one of one token), or noise."""
    rng = np.random.default_rng(seed)
    length = min(_LENGTH, manifest.max_positions or _LENGTH)
    lengths = np.array([length, 1, *rng.integers(1, length + 1, _ROWS - 2)])
    real = np.arange(length) < lengths[:, None]
    pad = manifest.text.pad_id if manifest.text else 0
    made: dict[str, Array] = {}
    for spec in Signature.of(manifest).inputs:
        shape = [{BATCH: _ROWS, LENGTH: length}[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "attention_mask":
            made[spec.name] = real.astype(np.int64)
        elif spec.name == "input_ids":
            ids = rng.integers(0, (manifest.vocabulary or 2) - 1, shape)
            made[spec.name] = np.where(real, ids + (ids >= pad), pad)  # any token but the padding
        elif spec.name == "token_type_ids":
            made[spec.name] = np.where(real, rng.integers(0, 2, shape), 0)
        else:
            made[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return made

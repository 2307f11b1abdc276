"""Random inputs of a model, for comparing what computes it."""

import numpy as np
from stageline.runtime.bundle.manifest import BATCH, LENGTH, Manifest
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array

_ROWS, _LENGTH = 5, 33
_LONGEST = 2048
_OUTPUT_BYTES = 256 * 2**20  # what a long row's outputs may take, in float32


def random_inputs(manifest: Manifest, seed: int) -> dict[str, Array]:
    """Inputs of the model: ragged rows of random tokens padded on the right (one full, one of one token), or noise."""
    rng = np.random.default_rng(seed)
    length = min(_LENGTH, manifest.max_positions or _LENGTH)
    return drawn_inputs(manifest, rng, np.array([length, 1, *rng.integers(1, length + 1, _ROWS - 2)]))


def long_inputs(manifest: Manifest, seed: int) -> dict[str, Array] | None:
    """One row of as many random tokens as the model has positions, at most 2048, fewer where its outputs would be very
    large; None where that is no longer than a row of `random_inputs`, or the model reads no tokens."""
    if all(LENGTH not in spec.shape for spec in Signature.of(manifest).inputs):
        return None
    widths = [spec.shape[-1] for spec in Signature.of(manifest).outputs]
    width = max((width for width in widths if isinstance(width, int)), default=1)
    length = min(_LONGEST, manifest.max_positions or _LONGEST, _OUTPUT_BYTES // (4 * width))
    return None if length <= _LENGTH else drawn_inputs(manifest, np.random.default_rng(seed), np.array([length]))


def drawn_inputs(manifest: Manifest, rng: np.random.Generator, lengths: Array) -> dict[str, Array]:
    """Inputs of the model: rows of `lengths` [rows] random tokens, padded on the right, or as many rows of noise."""
    rows, length = len(lengths), int(lengths.max())
    real = np.arange(length) < lengths[:, None]
    pad = manifest.text.pad_id if manifest.text else 0
    made: dict[str, Array] = {}
    for spec in Signature.of(manifest).inputs:
        shape = [{BATCH: rows, LENGTH: length}[d] if isinstance(d, str) else d for d in spec.shape]
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

"""Cutting a batch into micro-batches, and joining their outputs, in the order of the rows.

Rows padded on the right (by `attention_mask`) are sorted by length, and each micro-batch is cut to its own
longest row; joined outputs are padded back with zeros. So an output at a padded position is either zero or what the
model makes of padding: read it under the mask.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from stageline.runtime.bundle.manifest import BATCH, LENGTH, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines.base import Array

MICRO_BATCHES_PER_PLACE = 2  # one that runs and one that is next


@dataclass(frozen=True)
class RowSelection:
    """The rows of the batch in a micro-batch (a slice, or int64 [rows]), and how many tokens of each (None: all)."""

    rows: slice | Array
    length: int | None

    def index(self, spec: TensorSpec) -> tuple[slice | Array, ...]:
        """The part of a tensor of the whole batch that this micro-batch holds."""
        return tuple(
            self.rows if size == BATCH else slice(self.length) if size == LENGTH else slice(None) for size in spec.shape
        )


def default_rows(rows: int, tokens: float, places: int, ragged: bool, step_tokens: int = CpuDevice.step_tokens) -> int:
    """Rows of a micro-batch, for `rows` rows of `tokens` tokens each (on average, padding left out).

    `places` stages compute at a time, and `step_tokens` tokens are enough for each (`Device.step_tokens`).

    Rows of one length: enough that all places have work. Rows of different lengths: as few as make a worthwhile
    micro-batch, for the smaller it is, the less padding it computes. Measured on MiniLM: about 128 real tokens are best
    for ragged batches of any size, and double the speed of a single stage.
    """
    worthwhile = math.ceil(step_tokens / tokens)
    if ragged:
        return worthwhile
    return max(worthwhile, math.ceil(rows / (MICRO_BATCHES_PER_PLACE * places))) if places > 1 else rows


def split(
    signature: Signature,
    inputs: Mapping[str, Array],
    sizes: Mapping[str, int],
    places: int,
    micro_rows: int | None,
    max_rows: int | None = None,
    step_tokens: int = CpuDevice.step_tokens,
) -> list[RowSelection]:
    """Even pieces of at most `micro_rows` rows each (None: by `default_rows`), and never more than `max_rows`, that
    cover the batch once. `inputs` by name, each [batch, ...]; `sizes` of the free dimensions by name."""
    rows = sizes.get(BATCH, 1)
    lengths = _row_lengths(signature, inputs)
    if micro_rows is None:
        tokens = sizes.get(LENGTH, 1) if lengths is None else float(lengths.mean())
        ragged = lengths is not None and bool(lengths.min() < lengths.max())
        micro_rows = default_rows(rows, tokens, places, ragged, step_tokens)
    count = math.ceil(rows / min(micro_rows, max_rows or rows))
    bounds = [rows * i // count for i in range(count + 1)]
    if lengths is None:
        return [RowSelection(slice(start, end), None) for start, end in itertools.pairwise(bounds)]
    if count == 1:
        max_length = int(lengths.max())
        return [RowSelection(slice(0, rows), max_length if max_length < sizes[LENGTH] else None)]
    order = np.argsort(-lengths, kind="stable")
    chunks = [order[start:end] for start, end in itertools.pairwise(bounds)]
    return [RowSelection(chunk, int(lengths[chunk[0]])) for chunk in chunks]


def take(signature: Signature, inputs: Mapping[str, Array], piece: RowSelection) -> dict[str, Array]:
    """The inputs of one micro-batch, contiguous; views where they are contiguous already."""
    return {spec.name: np.asarray(inputs[spec.name][piece.index(spec)], order="C") for spec in signature.graph_inputs}


def join(
    outputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    pieces: Sequence[RowSelection],
    parts: Sequence[dict[str, Array]],
) -> dict[str, Array]:
    """The outputs of the whole batch from those of its micro-batches, in the rows' own order."""
    if len(pieces) == 1 and pieces[0].length is None:
        return parts[0]
    return {spec.name: _joined(spec, sizes, pieces, [part[spec.name] for part in parts]) for spec in outputs}


def _joined(
    spec: TensorSpec, sizes: Mapping[str, int], pieces: Sequence[RowSelection], parts: Sequence[Array]
) -> Array:
    first = parts[0].shape
    shape = [
        sizes[size] if size in (BATCH, LENGTH) and size in sizes else own
        for size, own in zip(spec.shape, first, strict=True)
    ]
    whole: Array = np.zeros(shape, parts[0].dtype)
    for piece, part in zip(pieces, parts, strict=True):
        whole[piece.index(spec)] = part
    return whole


def _row_lengths(signature: Signature, inputs: Mapping[str, Array]) -> Array | None:
    """Tokens in each row, int64 [rows], if rows are padded on the right and may be cut; None if they must not be."""
    mask = next((spec for spec in signature.inputs if spec.name == "attention_mask"), None)
    if mask is None or mask.shape != (BATCH, LENGTH):
        return None
    if any(isinstance(size, str) and size not in (BATCH, LENGTH) for spec in signature.outputs for size in spec.shape):
        return None  # a dimension that may follow the length in a way we do not know
    real = inputs["attention_mask"] != 0
    if real.all():
        return None
    lengths: Array = real.sum(axis=1)
    on_the_right = real == (np.arange(real.shape[1]) < lengths[:, None])
    return lengths if lengths.min() > 0 and on_the_right.all() else None

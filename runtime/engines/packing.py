"""A padded batch as packed tokens and back, for engines that compute on packed tokens alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from stageline.runtime.bundle.manifest import BATCH, LENGTH, LOGITS_AT, NEW_LENGTHS, PAST_LENGTHS, PICKS
from stageline.runtime.engines.base import Array, PackedRows

Dimensions = Mapping[str, tuple[int | str, ...]]
"""The dimensions of values by name, as the bundle has them."""


@dataclass(frozen=True)
class Packed:
    """A batch whose tokens are packed: its inputs by name, and the rows that have new tokens. `at` int64 [tokens] and
    `picked_at` int64 [picks] are the places of tokens and picks in the flattened batch, [rows * length] and
    [rows * picks of a row]; `used` int64 are the rows."""

    values: dict[str, Array]
    rows: PackedRows
    used: Array
    at: Array
    picked_at: Array
    batch: int
    length: int
    picks: int

    def unpacked(self, found: Mapping[str, Array], outputs: Dimensions) -> dict[str, Array]:
        """The results of the batch from those of its tokens, zeros where no token is."""
        return {name: self._spread(tokens, outputs[name]) for name, tokens in found.items()}

    def _spread(self, tokens: Array, dims: tuple[int | str, ...]) -> Array:
        for dimension, at, width in ((LENGTH, self.at, self.length), (PICKS, self.picked_at, self.picks)):
            if dimension in dims:
                axis = dims.index(dimension)
                flat = _scattered(tokens.squeeze(axis), at, self.batch * width)
                return np.moveaxis(flat.reshape(self.batch, width, *flat.shape[1:]), 1, axis)
        if BATCH not in dims:
            return tokens
        first = np.cumsum(self.rows.counts) - self.rows.counts  # what a row has once, each of its tokens has
        return _scattered(tokens[first], self.used, self.batch)


def packed(arrays: Mapping[str, Array], inputs: Dimensions, first_slot: int) -> Packed:
    """Pack the batch that `arrays` hold, whose rows are slots `first_slot` and on, for a stage with these inputs."""
    past, new = arrays[PAST_LENGTHS], arrays[NEW_LENGTHS]
    batch = len(new)
    length = next((arrays[name].shape[dims.index(LENGTH)] for name, dims in inputs.items() if LENGTH in dims), 1)
    used = np.flatnonzero(new)
    rows = PackedRows(first_slot + used, past[used], new[used])
    begins = np.cumsum(rows.counts) - rows.counts
    place = np.arange(rows.counts.sum()) - np.repeat(begins, rows.counts)  # of each token in its row
    at = np.repeat(used * length, rows.counts) + place
    values: dict[str, Array] = {}
    picked_at, picks = np.zeros(0, np.int64), 0
    for name, dims in inputs.items():
        if name == LOGITS_AT:
            chosen = np.minimum(arrays[name][used], rows.counts[:, None] - 1)  # padding is not read
            picks = chosen.shape[1]
            values[name] = (begins[:, None] + chosen).reshape(-1, 1)
            picked_at = (used[:, None] * picks + np.arange(picks)).reshape(-1)
        elif LENGTH in dims:
            values[name] = _gathered(arrays[name], dims.index(LENGTH), at)
        elif BATCH in dims:
            values[name] = np.repeat(arrays[name][used], rows.counts, axis=0)
        else:
            values[name] = arrays[name]
    values |= {PAST_LENGTHS: np.repeat(rows.past, rows.counts) + place, NEW_LENGTHS: np.ones(len(at), np.int64)}
    return Packed(values, rows, used, at, picked_at, batch, length, picks)


def token_shape(dims: tuple[int | str, ...], tokens: int, picks: int) -> list[int | str]:
    """The shape of a result of packed tokens; sizes that nobody knows beforehand are names."""
    known = {BATCH: picks if PICKS in dims else tokens, LENGTH: 1, PICKS: 1}
    return [known.get(size, size) if isinstance(size, str) else size for size in dims]


def _gathered(array: Array, axis: int, at: Array) -> Array:
    """[rows, ..., length, ...] -> [tokens, ..., 1, ...]."""
    tokens = np.moveaxis(array, axis, 1)
    flat = tokens.reshape(-1, *tokens.shape[2:])
    return np.expand_dims(flat if len(at) == len(flat) else flat[at], axis)


def _scattered(values: Array, at: Array, count: int) -> Array:
    if len(at) == count:
        return values
    whole: Array = np.zeros((count, *values.shape[1:]), values.dtype)
    whole[at] = values
    return whole

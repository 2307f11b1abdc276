"""The model's inputs for a step: of a range of slots, or of packed tokens."""

import numpy as np
from stageline.runtime.bundle.manifest import CACHED_INPUTS, ROW_LENGTHS
from stageline.runtime.engines import Array, PackedRows
from stageline.runtime.generation.steps import Step


def step_inputs(step: Step) -> tuple[dict[str, Array], int | PackedRows]:
    """The inputs by name, all int64, and where the tokens lie.

    Of a range: `input_ids` [slots, length], zero where a row has no new token; `past_lengths`, `new_lengths` and
    `row_lengths` [slots]; `logits_at` [slots, picks], those of a row at its end, then any. Of packed tokens: as
    `Engine.step` wants them.
    """
    return _packed_inputs(step) if step.first_slot is None else (_range_inputs(step, step.first_slot), step.first_slot)


def _range_inputs(step: Step, first_slot: int) -> dict[str, Array]:
    rows = step.arrays
    places = rows.slots - first_slot
    ids = np.zeros((step.batch, step.length), np.int64)
    if len(rows.tokens):
        own = np.zeros((len(places), step.length), np.int64)
        own[np.arange(step.length) < rows.counts[:, None]] = rows.tokens
        ids[places] = own
    past, new, whole = np.zeros((3, step.batch), np.int64)
    past[places], new[places], whole[places] = rows.starts, rows.counts, rows.row_lengths
    wanted = rows.picks[:, None]
    picks = np.zeros((step.batch, int(wanted.max())), np.int64)
    picks[places] = np.minimum(rows.counts[:, None] - wanted + np.arange(picks.shape[1]), rows.counts[:, None] - 1)
    return {**dict(zip(CACHED_INPUTS, (ids, past, new, picks), strict=True)), ROW_LENGTHS: whole}


def _packed_inputs(step: Step) -> tuple[dict[str, Array], PackedRows]:
    rows = step.arrays
    counts, places, lengths = rows.counts, rows.starts, rows.row_lengths
    if len(counts) == step.batch:  # a token each, as in most steps
        picks = np.flatnonzero(rows.picks)
    else:
        ends = np.cumsum(counts)
        places = np.arange(step.batch) + np.repeat(places - (ends - counts), counts)
        wanted = rows.picks
        picks = np.arange(wanted.sum()) + np.repeat(ends - np.cumsum(wanted), wanted)
        lengths = np.repeat(lengths, counts)
    values = rows.tokens[:, None], places, np.ones(step.batch, np.int64), picks[:, None]
    packed = PackedRows(rows.slots, rows.starts, counts, rows.blocks)
    return {**dict(zip(CACHED_INPUTS, values, strict=True)), ROW_LENGTHS: lengths}, packed

"""The model's inputs for a step: of a range of slots, or of packed tokens."""

import numpy as np
from stageline.runtime.bundle.manifest import CACHED_INPUTS, ROW_LENGTHS
from stageline.runtime.engines import Array, PackedRows
from stageline.runtime.generation.scheduler import Step


def step_inputs(step: Step) -> tuple[dict[str, Array], int | PackedRows]:
    """The inputs by name, all int64, and where the tokens lie.

    Of a range: `input_ids` [slots, length], zero where a row has no new token; `past_lengths`, `new_lengths` and
    `row_lengths` [slots]; `logits_at` [slots, picks], 0 or 1 pick in each row. Of packed tokens: as
    `Engine.step` wants them.
    """
    return _packed_inputs(step) if step.first_slot is None else (_range_inputs(step, step.first_slot), step.first_slot)


def _range_inputs(step: Step, first_slot: int) -> dict[str, Array]:
    ids = np.zeros((step.batch, step.length), np.int64)
    past, new, whole = np.zeros((3, step.batch), np.int64)
    picks = np.zeros((step.batch, int(any(row.last for row in step.rows))), np.int64)
    for row in step.rows:
        place = row.slot - first_slot
        tokens = row.continuation.tokens[row.start : row.start + row.count]
        ids[place, : len(tokens)] = tokens  # none of a step that is issued ahead
        past[place], new[place], whole[place] = row.start, row.count, row.row_length
        if row.last:
            picks[place] = row.count - 1
    return {**dict(zip(CACHED_INPUTS, (ids, past, new, picks), strict=True)), ROW_LENGTHS: whole}


def _packed_inputs(step: Step) -> tuple[dict[str, Array], PackedRows]:
    slots, past, counts, lengths, last = np.array(
        [(row.slot, row.start, row.count, row.row_length, row.last) for row in step.rows], np.int64
    ).T.copy()
    blocks = np.array([block for row in step.rows for block in row.blocks], np.int32) if step.rows[0].blocks else None
    rows = PackedRows(slots, past, counts, blocks)
    if len(step.rows) == step.batch:  # a token each, as in most steps
        ids = np.array([row.continuation.tokens[row.start] for row in step.rows], np.int64)
        places, picks = past, np.flatnonzero(last)
    else:
        ends = np.cumsum(counts)
        ids = np.concatenate([row.continuation.tokens[row.start : row.start + row.count] for row in step.rows])
        places = np.arange(step.batch) + np.repeat(past - (ends - counts), counts)
        picks = ends[last != 0] - 1
        lengths = np.repeat(lengths, counts)
    values = (ids.astype(np.int64)[:, None], places, np.ones(step.batch, np.int64), picks[:, None])
    return {**dict(zip(CACHED_INPUTS, values, strict=True)), ROW_LENGTHS: lengths}, rows

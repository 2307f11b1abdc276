"""Rows that the reference must compute one by one: transformers lets the longest row of a batch decide for all.

So it is where rotary frequencies depend on the length of a row (longrope, dynamic NTK); and dynamic NTK keeps those of
the longest row so far for later calls. Classifiers that know no padding token take the last place of every row.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from stageline.exporter.last_token import lacks_padding
from stageline.exporter.rotary_scaling import scaled_rotary
from stageline.runtime.engines import Array

Values = dict[str, Array]


def forget_lengths(model: torch.nn.Module) -> None:
    """Give the model the frequencies that it had before its first call."""
    for one in scaled_rotary(model):
        original = getattr(one.module, one.frequencies.replace("inv_freq", "original_inv_freq"))
        setattr(one.module, one.frequencies, original.clone())
        setattr(one.module, one.frequencies.replace("inv_freq", "max_seq_len_cached"), one.module.original_max_seq_len)


def rows_alone(
    model: torch.nn.Module, compute: Callable[[Mapping[str, Array]], Values], inputs: Mapping[str, Array]
) -> Values:
    """What `compute` gives for the rows of `inputs`: in one batch, or each alone, without its padding, where the model
    depends on the length of a row. Values of padding are zero then."""
    mask = inputs.get("attention_mask")
    if mask is None or not (scaled_rotary(model) or lacks_padding(model)):
        return compute(inputs)
    rows = []
    for number, tokens in enumerate(mask.sum(axis=1)):
        forget_lengths(model)
        rows.append(compute({name: array[number : number + 1, :tokens] for name, array in inputs.items()}))
    forget_lengths(model)
    return {name: _joined([row[name][0] for row in rows]) for name in rows[0]}


def _joined(rows: list[Array]) -> Array:
    """Arrays of unlike lengths as one [rows, length, ...], padded with zeros."""
    shape = np.max([row.shape for row in rows], axis=0)
    return np.stack(
        [np.pad(row, [(0, size - has) for size, has in zip(shape, row.shape, strict=True)]) for row in rows]
    )

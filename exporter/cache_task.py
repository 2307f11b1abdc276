"""A causal model as a torch module that knows of its KV cache: what it has seen before is an input."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from stageline.exporter.rotary_scaling import row_scaling, rows_of, scaled_rotary
from stageline.exporter.skeleton import Input, RefusedError, first_position
from stageline.runtime.bundle.manifest import (
    BATCH,
    INPUT_IDS,
    LENGTH,
    LOGITS_AT,
    NEW_LENGTHS,
    PAST_LENGTHS,
    PICKS,
    ROW_LENGTHS,
)


class CacheTask(torch.nn.Module):
    """A causal model as `logits [batch, picks, vocabulary]` of each row's new tokens.

    Inputs: `input_ids [batch, length]`, rows padded on the right; `past_lengths [batch]`, the tokens that each row has
    seen before; `new_lengths [batch]`, its real tokens now; `logits_at [batch, picks]`, the places whose logits are
    wanted; `row_lengths [batch]` if its rotary embeddings depend on the length of a row. All int64. Within
    `over(past_lengths, new_lengths)` its attention functions know the lengths of the rows.
    RefusedError if the model cannot be run this way.
    """

    inputs: tuple[Input, ...] = (
        Input(INPUT_IDS, torch.int64, (BATCH, LENGTH)),
        Input(PAST_LENGTHS, torch.int64, (BATCH,)),
        Input(NEW_LENGTHS, torch.int64, (BATCH,)),
        Input(LOGITS_AT, torch.int64, (BATCH, PICKS)),
    )
    output_names = ("logits",)

    def __init__(self, model: Any, over: Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.model, self.over = model, over
        self.scaled = scaled_rotary(model)
        self.row_scaling = row_scaling(self.scaled)
        if self.scaled:
            self.inputs = (*self.inputs, Input(ROW_LENGTHS, torch.int64, (BATCH,)))
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" not in accepted:
            raise RefusedError("it does not take the positions of its tokens")
        self.first_position = first_position(model)
        self.extra = {"use_cache": False} if "use_cache" in accepted else {}
        if model.get_output_embeddings() is None:
            raise RefusedError("its output embeddings are not a module")

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        ids, past, new, logits_at, *row_lengths = tensors
        places = past[:, None] + torch.arange(ids.shape[1], dtype=torch.int64)
        # Padding takes the last real position, so that no place lies outside a table of positions.
        positions = torch.minimum(places, (past + new - 1).clamp(min=0)[:, None]) + self.first_position

        def pick(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            """Hidden states [batch, length, width] -> [batch, picks, width], before they become logits."""
            index = logits_at[:, :, None].expand(-1, -1, args[0].shape[-1])
            return (args[0].gather(1, index),)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            with self.over(past, new), rows_of(self.scaled, *row_lengths):
                result = self.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    position_ids=positions,
                    return_dict=True,
                    **self.extra,
                )
        finally:
            handle.remove()
        if result.logits.shape[1] != logits_at.shape[1]:
            raise RefusedError("it makes logits without calling its output embeddings")
        return (result.logits,)

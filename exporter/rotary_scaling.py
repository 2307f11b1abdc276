"""Rotary embeddings whose frequencies depend on the length of a row (longrope, dynamic NTK), expressed in the graph.

transformers chooses the frequencies by the longest row of a batch, with a branch in Python and a state that outlives
the call (`transformers.modeling_rope_utils.dynamic_rope_update`). Here each row has the frequencies that transformers
gives it when it runs alone.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from stageline.exporter.skeleton import RefusedError
from stageline.runtime.bundle.manifest import RowScaling
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding


@dataclass(frozen=True)
class ScaledRotary:
    """One rotary embedding, for one type of layer (None: for all). Rows of more than `limit` tokens have the
    frequencies `long`, float32 [size / 2]; None: those of dynamic NTK, computed from the row's length."""

    module: Any
    layer_type: str | None
    limit: int
    long: torch.Tensor | None

    @property
    def frequencies(self) -> str:
        """The module's attribute that holds its frequencies."""
        return "inv_freq" if self.layer_type is None else f"{self.layer_type}_inv_freq"

    def of_rows(self, lengths: torch.Tensor) -> torch.Tensor:
        """The frequencies for rows of `lengths` [batch] tokens, float32 [batch, 1, size / 2]."""
        each = lengths[:, None, None]
        long = self.long
        if long is None:
            initial = ROPE_INIT_FUNCTIONS["dynamic"]
            long, _ = initial(self.module.config, lengths.device, seq_len=each, layer_type=self.layer_type)
        short = getattr(self.module, self.frequencies.replace("inv_freq", "original_inv_freq"))
        return torch.where(each > self.limit, long, short)


def scaled_rotary(model: torch.nn.Module) -> tuple[ScaledRotary, ...]:
    """The model's rotary embeddings that depend on the length of a row."""
    found = []
    module: Any
    for module in model.modules():
        stated = getattr(module, "rope_type", None)
        if not hasattr(type(module).forward, "__wrapped__"):
            continue  # it does without transformers' update
        types = stated.items() if isinstance(stated, dict) else [(None, stated)]
        for layer_type, kind in types:
            if kind == "longrope":
                found.append(_longrope(module, layer_type))
            elif isinstance(kind, str) and "dynamic" in kind:
                found.append(ScaledRotary(module, layer_type, int(module.original_max_seq_len), None))
    return tuple(found)


def _longrope(module: Any, layer_type: str | None) -> ScaledRotary:
    parameters = module.config.rope_parameters
    limit = int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, None, seq_len=limit + 1, layer_type=layer_type)
    return ScaledRotary(module, layer_type, limit, long)


def row_scaling(scaled: Sequence[ScaledRotary]) -> RowScaling | None:
    """What the runtime must know of them. RefusedError if they do not change at one length."""
    rules = {RowScaling(shortest=s.limit, longest=None if s.long is None else s.limit + 1) for s in scaled}
    if len(rules) > 1:
        raise RefusedError("its rotary embeddings change with the length of a row in several ways")
    return next(iter(rules), None)


@contextlib.contextmanager
def rows_of(scaled: Sequence[ScaledRotary], lengths: torch.Tensor | None = None) -> Iterator[None]:
    """While entered, the embeddings rotate row i for a row of `lengths[i]` tokens; int64 [batch], None if there are no
    embeddings."""
    modules = {id(one.module): one.module for one in scaled}
    for module in modules.values():
        mine = {one.layer_type: one for one in scaled if one.module is module}
        assert lengths is not None
        module.forward = partial(_forward, module, mine, lengths)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _forward(
    module: Any,
    scaled: dict[str | None, ScaledRotary],
    lengths: torch.Tensor,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> Any:
    """In place of the module's forward."""
    named = {} if layer_type is None else {"layer_type": layer_type}
    if layer_type not in scaled:
        return type(module).forward(module, x, position_ids, **named)
    one = scaled[layer_type]
    if isinstance(module, PhimoeRotaryEmbedding):
        return _phimoe(module, x, position_ids, lengths[:, None, None] > one.limit)
    vars(module)[one.frequencies] = one.of_rows(lengths)  # hides the buffer of that name
    try:
        return type(module).forward.__wrapped__(module, x, position_ids, **named)
    finally:
        del vars(module)[one.frequencies]


def _phimoe(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor, is_long: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PhiMoE keeps its short frequencies, and scales cosine and sine by the length of the row."""
    parameters = module.config.rope_parameters
    scale = torch.where(is_long, float(parameters["long_mscale"]), float(parameters["short_mscale"]))
    angles = position_ids[..., None].float() * module.original_inv_freq
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)

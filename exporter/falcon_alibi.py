"""Falcon's ALiBi, which transformers rounds to bfloat16 whatever the dtype of the model, as float32 arithmetic.

From position 256 on the rounded biases differ from the exact ones. Engines that compute bfloat16 graphs in float32
leave out the casts that round, so the rounding is spelled out: with c = (2**16 + 1) x, the float32 number c - (c - x)
is x rounded to the 8 bits of bfloat16 (Dekker 1971, "A floating-point technique for extending the available
precision").
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

_SPLIT = 2.0**16 + 1


@contextlib.contextmanager
def rounded_alibi(model: Any) -> Iterator[None]:
    """While entered, Falcon's model with ALiBi computes it in float32, to the same values."""
    if model.config.model_type != "falcon" or not model.config.alibi:
        yield
        return
    from transformers.models.falcon import modeling_falcon

    second = torch.ones(1, 2, dtype=torch.int64)  # at position 1 the bias is the slope
    slopes = modeling_falcon.build_alibi_tensor(second, model.config.num_attention_heads, torch.float32)[:, 0, 1]

    def build(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        batch, length = attention_mask.shape
        places = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
        alibi = rounded(slopes[:, None] * rounded(places.float()))  # [batch, heads, length]
        return alibi.reshape(batch * num_heads, 1, length).to(dtype)

    with mock.patch.object(modeling_falcon, "build_alibi_tensor", build):
        yield


def rounded(values: torch.Tensor) -> torch.Tensor:
    """float32 values, rounded to the nearest of bfloat16, ties to even."""
    larger = values * _SPLIT
    return larger - (larger - values)

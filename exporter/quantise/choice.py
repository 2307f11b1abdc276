"""Which of a model's weights are quantised at export, and how: matrices of products in the bits that are asked for,
tables and heads in 8, since every token depends on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from stageline.exporter.quantise.nearest import Bits, Scheme

MIN_WEIGHTS = 1 << 14  # smaller matrices stay as they are
SMALLEST_GROUP = 16  # that engines multiply by
QuantisedDtype = Literal["int8", "int4"]
Method = Literal["nearest", "gptq"]
_BITS: dict[QuantisedDtype, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantisation:
    """What a user asks for: the type of the numbers, and how many columns of a row have a scale together. Where that
    does not divide a row, it is halved until it does.

    `texts`: what gptq calibrates with; none: what the model draws itself."""

    dtype: QuantisedDtype
    group: int
    method: Method = "nearest"
    texts: tuple[str, ...] = ()


def schemes(model: Any, names: Mapping[str, str], wanted: Quantisation) -> dict[str, Scheme]:
    """How each tensor is quantised that is: by the checkpoint's name for it. `names` maps the model's parameters to
    these. Matrices of fewer than MIN_WEIGHTS numbers are left out, and those whose rows no group divides."""
    found: dict[str, Scheme] = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in model.named_modules():
        name = names.get(f"{path}.weight")
        if name is None or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        exact = isinstance(module, torch.nn.Embedding) or module is head
        bits: Bits = 8 if exact or (name in found and found[name].bits == 8) else _BITS[wanted.dtype]
        group = _group(module.weight.shape[1], wanted.group)
        if module.weight.numel() >= MIN_WEIGHTS and group is not None:
            found[name] = Scheme(bits, group)
    return found


def _group(columns: int, wanted: int) -> int | None:
    group = wanted
    while columns % group and group > SMALLEST_GROUP:
        group //= 2
    return None if columns % group else group

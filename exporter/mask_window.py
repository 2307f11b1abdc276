"""Reading from a mask function of transformers which tokens it shows: all earlier ones, or a sliding window of them."""

from collections.abc import Callable
from typing import Any

import torch
from stageline.exporter.skeleton import RefusedError
from torch.utils._python_dispatch import _disable_current_modes

_FAR = 1 << 20  # a query so late that any window has closed behind it


def window_of(mask_function: Callable[..., Any]) -> int | None:
    """How many tokens a causal mask shows a query, itself included; None for all. Found by probing the mask.

    RefusedError if it is neither causal nor a sliding window.
    """
    try:
        with _disable_current_modes():
            shown = _shown(mask_function, _FAR)
            window = int(shown.sum())
            for query in (0, 1, 2, 7, 100, *(q for q in (window - 1, window, window + 1) if q < _FAR)):
                seen = _shown(mask_function, query)
                if int(seen.sum()) != min(window, query + 1) or not bool(seen[-min(window, query + 1) :].all()):
                    raise RefusedError("its masks are neither causal nor of a sliding window")
    except RefusedError:
        raise
    except Exception as error:  # a mask that depends on data
        raise RefusedError("its masks depend on more than the places of the tokens") from error
    return window if window <= _FAR else None


def _shown(mask_function: Callable[..., Any], query: int) -> torch.Tensor:
    """Which of the tokens 0 to `query` that query sees, bool [query + 1]; later ones must be hidden."""
    zero = torch.tensor(0)
    kv = torch.arange(query + 2)
    shown = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), kv)).expand(query + 2)
    if bool(shown[-1]):
        raise RefusedError("its attention is not causal")
    return shown[:-1]

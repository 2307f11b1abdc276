"""What counts as a large error: each token's, as a fraction of how large the reference's values are."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.engines import Array

_SMALLEST = 1e-6  # a scale is no smaller: rounding leaves such values where others cancel out
_PART = 2**20  # values that are looked at together
_INFINITE = 1e30  # models mask logits by the smallest number of their type, which types do not share


def typical(want: Array) -> float:
    """How large a token is in `want` [..., values]: the median of the tokens' largest magnitudes."""
    return _median(_largest(want))


def token_errors(got: Array, want: Array, usual: float | None = None) -> NDArray[np.float64]:
    """The largest error of each token, float64 [...], of `got` and `want` [..., values].

    It is a fraction of the largest value that the reference `want` has for the token, because some tokens carry values
    a thousand times larger than others; or of what is `usual`, if that is larger (None: `typical` of `want`), because a
    token's only value may be near zero by chance. Where one of the two is not finite, the other must be the same; else
    the error is infinite.
    """
    got, want = np.atleast_1d(got), np.atleast_1d(want)
    largest = _largest(want)
    scale = np.maximum(largest, max(_SMALLEST, _median(largest) if usual is None else usual))
    differences = [_difference(ours, theirs) for ours, theirs in zip(_parts(got), _parts(want), strict=True)]
    errors: NDArray[np.float64] = np.concatenate(differences or [np.zeros(0)]).reshape(scale.shape) / scale
    return errors


def _median(largest: NDArray[np.float64]) -> float:
    return float(np.median(largest)) if largest.size else 0.0


def _difference(got: NDArray[np.float64], want: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest difference of each token, of [tokens, values]; infinite as in `token_errors`."""
    alike = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        difference = np.where(alike, 0.0, np.abs(got - want))
    worst: NDArray[np.float64] = np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(axis=-1, initial=0)
    return worst


def _largest(values: Array) -> NDArray[np.float64]:
    """The largest finite magnitude of each token, [...] of [..., values]."""
    values = np.atleast_1d(values)
    found = [np.abs(np.where(np.isfinite(part), part, 0)).max(axis=-1, initial=0) for part in _parts(values)]
    magnitudes: NDArray[np.float64] = np.concatenate(found or [np.zeros(0)]).reshape(values.shape[:-1])
    return magnitudes


def _parts(values: Array) -> Iterator[NDArray[np.float64]]:
    """[..., values] as [tokens, values] in float64, some tokens at a time: logits of long rows take gigabytes. What
    stands for infinity is infinite."""
    flat = values.reshape(-1, values.shape[-1]) if values.size else values.reshape(0, values.shape[-1])
    tokens = max(1, _PART // max(1, values.shape[-1]))
    for first in range(0, len(flat), tokens):
        wide = flat[first : first + tokens].astype(np.float64)
        wide[np.abs(wide) > _INFINITE] *= np.inf
        yield wide

"""What counts as a large error: each token's, as a fraction of how large the reference's values are."""

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.engines import Array

_SMALLEST = 1e-6  # a scale is no smaller: rounding leaves such values where others cancel out
_INFINITE = 1e30  # models mask logits by the smallest number of their type, which types do not share


def typical(want: Array) -> float:
    """How large a token is in `want` [..., values]: the median of the tokens' largest magnitudes."""
    return float(np.median(_largest(_plain(want)))) if want.size else 0.0


def token_errors(got: Array, want: Array, usual: float | None = None) -> NDArray[np.float64]:
    """The largest error of each token, float64 [...], of `got` and `want` [..., values].

    It is a fraction of the largest value that the reference `want` has for the token, because some tokens carry values
    a thousand times larger than others; or of what is `usual`, if that is larger (None: `typical` of `want`), because a
    token's only value may be near zero by chance. Where one of the two is not finite, the other must be the same; else
    the error is infinite.
    """
    got, want = _plain(got), _plain(want)
    alike = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        difference = np.where(alike, 0.0, np.abs(got - want))
    scale = np.maximum(_largest(want), max(_SMALLEST, typical(want) if usual is None else usual))
    errors: NDArray[np.float64] = np.nan_to_num(difference / scale[..., None], nan=np.inf, posinf=np.inf)
    worst: NDArray[np.float64] = errors.max(axis=-1, initial=0)
    return worst


def _plain(values: Array) -> NDArray[np.float64]:
    """In float64, [..., values], what stands for infinity as infinity."""
    wide = np.atleast_1d(values).astype(np.float64)
    return np.where(np.abs(wide) > _INFINITE, np.copysign(np.inf, wide), wide)


def _largest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    magnitudes: NDArray[np.float64] = np.abs(np.where(np.isfinite(values), values, 0)).max(axis=-1, initial=0)
    return magnitudes

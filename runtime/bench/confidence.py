"""Confidence intervals: Student's t over repeats, Welch's t for a difference."""

import functools
import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of independent repeats; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    reach = t_quantile(count - 1) * error
    return mean - reach, mean + reach


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of mean(after) - mean(before), variances not assumed equal (Welch); None if either
    has fewer than two values."""
    if min(len(before), len(after)) < 2:
        return None
    shares = [float(np.var(values, ddof=1)) / len(values) for values in (before, after)]
    centre = float(np.mean(after)) - float(np.mean(before))
    if sum(shares) == 0:
        return centre, centre
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (before, after), strict=True)
    )
    reach = t_quantile(freedom) * math.sqrt(sum(shares))
    return centre - reach, centre + reach


@functools.lru_cache(maxsize=4096)
def t_quantile(freedom: float) -> float:
    """How many standard errors to either side hold 95 % of Student's t with `freedom` degrees of freedom, at least 1.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1): integrated by Gauss and Legendre, and the
    angle found by halving.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        inside = scale * angle * float(np.sum(_WEIGHTS * np.cos(angle * (_NODES + 1) / 2) ** (freedom - 1)))
        low, high = (angle, high) if inside < CONFIDENCE else (low, angle)
    return math.sqrt(freedom) * math.tan(low)

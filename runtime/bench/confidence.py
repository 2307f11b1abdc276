"""How sure a figure is: Student's t over repeats, Welch's t for differences and ratios, what a sample can carry."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
    found = _welch(before, after)
    if found is None:
        return None
    centre, error, freedom = found
    reach = t_quantile(freedom) * error
    return centre - reach, centre + reach


def chance(before: Sequence[float], after: Sequence[float]) -> float | None:
    """How often equal means would give values at least as far apart as these: the two-sided p-value of Welch's test.
    None if either has fewer than two values."""
    found = _welch(before, after)
    if found is None:
        return None
    centre, error, freedom = found
    if error == 0:
        return 1.0 if centre == 0 else 0.0
    return max(0.0, 1 - _inside(math.atan(abs(centre) / error / math.sqrt(freedom)), freedom))


def together(chances: Sequence[float]) -> list[float]:
    """The chances of several comparisons, raised so that of those at or below 0.05, on average 1 in 20 is there by
    chance; if nothing differs, there is one 1 time in 20 (Benjamini and Hochberg, 1995: adjusted p-values)."""
    order = sorted(range(len(chances)), key=lambda place: -chances[place])
    raised, least = [1.0] * len(chances), 1.0
    for passed, place in enumerate(order):
        least = min(least, chances[place] * len(chances) / (len(chances) - passed))
        raised[place] = least
    return raised


def _welch(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float] | None:
    """The difference of the means, its standard error, and Welch and Satterthwaite's degrees of freedom."""
    if min(len(before), len(after)) < 2:
        return None
    centre = float(np.mean(after)) - float(np.mean(before))
    shares = [float(np.var(values, ddof=1)) / len(values) for values in (before, after)]
    if sum(shares) == 0:
        return centre, 0.0, 1.0
    parts = [share / sum(shares) for share in shares]
    freedom = 1 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (before, after), strict=True))
    return centre, math.sqrt(sum(shares)), freedom


@dataclass(frozen=True)
class Ratio:
    """How many times one figure another is, with the 95 % confidence interval; None where it is not known.

    Speeds and times are positive and vary by factors, so both come from their logarithms: `value` is the ratio of the
    geometric means, and the interval is Welch's of the difference of the logarithms (Kirkup and Frenkel, 2006, section
    8.3.3). It never reaches zero, and the inverse ratio has the inverse interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    """How often two figures that are alike would differ so much."""

    @classmethod
    def between(cls, theirs: Sequence[float], ours: Sequence[float]) -> Self | None:
        """Ours over theirs, from the values of their repeats; None if there are none, or one is not above zero. A
        single repeat on either side leaves the interval unknown."""
        values = [*theirs, *ours]
        if not theirs or not ours or not all(0 < value < math.inf for value in values):
            return None
        logs = [[math.log(value) for value in side] for side in (theirs, ours)]
        bounds = difference(*logs)
        centre = math.exp(float(np.mean(logs[1])) - float(np.mean(logs[0])))
        if bounds is None:
            return cls(centre)
        return cls(centre, _factor(bounds[0]), _factor(bounds[1]), chance(*logs))


def _factor(log: float) -> float:
    return math.exp(max(-700.0, min(700.0, log)))  # beyond it a float ends


def requests_needed(figure: str) -> int:
    """How many requests a repeat must have for this figure to mean what its name says: 1 / (1 - q) for the quantile q,
    so that at least one request lies beyond it (p90: 10, p95: 20, p99: 100); 1 for medians and all others."""
    found = re.search(r"_p(\d+)_s$", figure)
    percent = int(found[1]) if found else 50
    return 1 if percent <= 50 else math.ceil(100 / (100 - percent))


@functools.lru_cache(maxsize=4096)
def t_quantile(freedom: float) -> float:
    """How many standard errors to either side hold 95 % of Student's t with `freedom` degrees of freedom, at least 1.

    By Newton's steps in the angle: the share is concave in it, so that they come from below and never pass the place.
    """
    angle = 0.0
    while (step := (CONFIDENCE - _inside(angle, freedom)) / _density(angle, freedom)) > 1e-12:
        angle += step
    return math.sqrt(freedom) * math.tan(angle)


def _inside(angle: float, freedom: float) -> float:
    """The share of Student's t within sqrt(freedom) tan(angle) to either side: its density in the angle, integrated by
    Gauss and Legendre."""
    heights = np.cos(angle * (_NODES + 1) / 2) ** (freedom - 1)
    return _density(0.0, freedom) * angle / 2 * float(np.sum(_WEIGHTS * heights))


def _density(angle: float, freedom: float) -> float:
    """How fast that share grows with the angle: by cos(angle)^(freedom - 1), for t = sqrt(freedom) tan(angle)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 2 * scale * float(math.cos(angle) ** (freedom - 1))

"""Distributions of lengths in tokens: one length, a range, or a normal distribution within bounds."""

import random
import re
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

from stageline.models.errors import RequestError


@dataclass(frozen=True)
class Lengths:
    """Lengths of `min` to `max` tokens, all equally likely; with `mean` and `stdev`, normal within these bounds."""

    min: int
    max: int
    mean: float | None = None
    stdev: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `64`, `16-128` or `normal:64,20,16-128` (mean, standard deviation, bounds). RequestError otherwise."""
        match = re.fullmatch(r"(?:normal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?),(?=\d+-))?(\d+)(?:-(\d+))?", text.strip())
        if match:
            low, high = int(match[3]), int(match[4] or match[3])
            mean, stdev = (None, None) if match[1] is None else (float(match[1]), float(match[2]))
            if 1 <= low <= high < 2**31 and (mean is None or stdev is None or (low <= mean <= high and stdev > 0)):
                return cls(low, high, mean, stdev)
        raise RequestError(
            f"{text!r} is not a length; give tokens like 64, a range like 16-128, "
            "or mean, deviation and bounds like normal:64,20,16-128"
        )

    def draw(self, source: random.Random) -> int:
        """One length."""
        if self.min == self.max:
            return self.min
        if self.mean is None or self.stdev is None:
            return source.randint(self.min, self.max)
        normal = NormalDist(self.mean, self.stdev)
        place = source.uniform(normal.cdf(self.min), normal.cdf(self.max))
        length = normal.inv_cdf(min(max(place, 1e-12), 1 - 1e-12))  # it takes neither 0 nor 1
        return min(self.max, max(self.min, round(length)))

    def __str__(self) -> str:
        if self.mean is not None:
            return f"{self.min} to {self.max} (normal: {self.mean:g} ± {self.stdev:g})"
        return f"{self.min}" if self.min == self.max else f"{self.min} to {self.max}"

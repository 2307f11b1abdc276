"""Counts of times by fixed bounds, as Prometheus keeps histograms: cheap to add to, and summable over replicas."""

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS_S = tuple(float(f"{step}e{power}") for power in range(-4, 3) for step in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds in seconds, from 0.1 ms to 700 s: neighbours differ by at most two thirds, so that percentiles that are
interpolated between them are close."""


@dataclass(frozen=True)
class Histogram:
    """`counts[n]`: the times in (BOUNDS_S[n - 1], BOUNDS_S[n]]; the last, those beyond all bounds. `total_s`: their
    sum."""

    counts: tuple[int, ...]
    total_s: float


class TimeCounter:
    """A histogram that grows. Written by one thread at a time, or under its owner's lock; read by any."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._total_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a time, or as many of them."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += times
        self._total_s += seconds * times

    def histogram(self) -> Histogram:
        """A snapshot."""
        return Histogram(tuple(self._counts), self._total_s)

"""Counts of times, or of lengths, by fixed bounds, as Prometheus keeps histograms: cheap to add to, and summable over
replicas."""

from bisect import bisect_left
from dataclasses import dataclass

_VLLM_S = (
    0.025, 0.04, 0.06, 0.075, 0.08, 0.25, 0.4, 0.75, 0.8, 2.5, 7.5, 40, 60, 80, 120, 160, 240, 480, 640, 960, 1920,
    2560, 7680,
)  # fmt: skip
BOUNDS_S = tuple(
    sorted({*_VLLM_S, *(float(f"{step}e{power}") for power in range(-4, 3) for step in (1, 1.5, 2, 3, 5, 7))})
)
"""Upper bounds in seconds, from 0.1 ms to about two hours. Up to 700 s neighbours differ by at most two thirds, so that
percentiles that are interpolated between them are close; all bounds of vLLM's are among them, so that what counts up to
one of these counts right."""
BOUNDS_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
"""Upper bounds of lengths, in tokens."""


@dataclass(frozen=True)
class Histogram:
    """`counts[n]`: the values in (bounds[n - 1], bounds[n]]; the last, those beyond all bounds. `total`: their sum."""

    counts: tuple[int, ...]
    total: float
    bounds: tuple[float, ...] = BOUNDS_S


class Tally:
    """A histogram that grows. Written by one thread at a time, or under its owner's lock; read by any."""

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, or as many of them."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def histogram(self) -> Histogram:
        """A snapshot."""
        return Histogram(tuple(self._counts), self._total, self._bounds)

"""Histograms and latency over time: few rows for the browser, however many requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stageline.runtime.bench.confidence import requests_needed
from stageline.runtime.bench.records import ANSWERED, Requests

_BINS, _SLICES, _A_SLICE = 60, 80, 20  # bins; slices at most; requests in each at least
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """The number of requests of each run, and the rows of both charts."""

    counts: tuple[int, ...]
    histogram: list[dict[str, Any]]
    over_time: list[dict[str, Any]]


def spread(names: Sequence[str], all_requests: Sequence[Requests]) -> Spread:
    """The spread of runs with these names and requests."""
    named, bounds = list(zip(names, all_requests, strict=True)), edges(all_requests)
    return Spread(
        tuple(map(len, all_requests)),
        [row for name, requests in named for row in histogram(name, requests, bounds)],
        [row for name, requests in named for row in over_time(name, requests)],
    )


def histogram(name: str, requests: Requests, edges_s: Floats) -> list[dict[str, Any]]:
    """The share of requests, in percent, whose latency lies between neighbouring edges (seconds)."""
    latency = requests.latency_s[requests.status == ANSWERED]
    counts = np.diff(np.searchsorted(np.sort(latency), edges_s))
    total = max(1, len(latency))
    return [
        {"run": name, "low_s": float(low), "high_s": float(high), "percent": 100 * float(count) / total}
        for low, high, count in zip(edges_s[:-1], edges_s[1:], counts, strict=True)
    ]


def edges(all_requests: Sequence[Requests]) -> Floats:
    """Edges of bins for all latencies (seconds), evenly spaced on a logarithmic scale."""
    known = [r.latency_s[r.status == ANSWERED] for r in all_requests]
    lows = [float(one.min()) for one in known if len(one)]
    highs = [float(one.max()) for one in known if len(one)]
    low, high = max(1e-6, min(lows, default=1e-3)), max(highs, default=1.0)
    return np.geomspace(low * 0.999, max(high, low * 1.01) * 1.001, _BINS + 1)


def over_time(name: str, requests: Requests) -> list[dict[str, Any]]:
    """Median latency by intended arrival, in slices of a repeat, and p99 where a slice has requests enough for it; all
    repeats are overlaid."""
    good = requests.status == ANSWERED
    at, latency = requests.intended_s[good], requests.latency_s[good]
    if not len(at):
        return []
    slices = max(1, min(_SLICES, len(at) // _A_SLICE))
    low, high = float(at.min()), float(at.max()) + 1e-9
    bounds = np.linspace(low, high, slices + 1)
    place = np.minimum((at - low) * (slices / (high - low)), slices - 1).astype(np.uint8)  # small ones sort fast
    order = np.argsort(place, kind="stable")
    parts = np.split(latency[order], np.searchsorted(place[order], np.arange(1, slices)))
    rows = []
    for number, part in enumerate(parts):
        if len(part):
            p50, p99 = np.percentile(part, [50, 99]).tolist()
            middle = float(bounds[number] + bounds[number + 1]) / 2
            rows.append({"run": name, "at_s": middle, "percentile": "p50", "seconds": p50})
            if len(part) >= requests_needed("latency_p99_s"):
                rows.append({"run": name, "at_s": middle, "percentile": "p99", "seconds": p99})
    return rows

"""A service's /metrics, read once: values, histograms, and one line for whatever is wrong."""

import math
import time
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse

import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families
from stageline.dashboard.addresses import OPENER
from stageline.models.errors import StagelineError

_TIMEOUT_S = 3.0
_WHOLE_S = 10.0
_LIMIT_BYTES = 4 * 1024**2
Key = tuple[str, tuple[tuple[str, str], ...]]
"""The name of a metric and its sorted labels."""


@dataclass(frozen=True)
class Buckets:
    """A histogram: `counts[n]`, float64 [bounds], of the times of at most `bounds[n]` s; the last bound is inf."""

    bounds: tuple[float, ...]
    counts: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """All metrics at a time (seconds since the epoch)."""

    at_s: float
    values: Mapping[Key, float]
    histograms: Mapping[Key, Buckets] = field(default_factory=dict)

    def get(self, name: str, **labels: str) -> float | None:
        """The value of a metric; None if the service does not report it."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def total(self, name: str, **fixed: str) -> float | None:
        """The sum of a metric over the labels that are not given; None if the service does not report it."""
        found = [value for (metric, labels), value in self.values.items() if metric == name and _has(labels, fixed)]
        return sum(found) if found else None

    def buckets(self, name: str, **labels: str) -> Buckets | None:
        """A histogram; None if the service does not report it."""
        return self.histograms.get((name, tuple(sorted(labels.items()))))

    def labels(self, name: str, label: str, **fixed: str) -> list[str]:
        """The values of a label of a metric, for fixed other labels."""
        found = [dict(labels) for metric, labels in self.values if metric == name]
        return [one[label] for one in found if label in one and fixed.items() <= one.items()]


def parsed(text: str, at_s: float) -> Sample:
    """Parse Prometheus' text format. StagelineError if `text` is not a service's metrics."""
    values: dict[Key, float] = {}
    below: dict[Key, dict[float, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                labels = dict(one.labels)
                if family.type == "histogram" and one.name.endswith("_bucket"):
                    bound = float(labels.pop("le"))
                    below.setdefault((family.name, tuple(sorted(labels.items()))), {})[bound] = one.value
                else:
                    values[one.name, tuple(sorted(labels.items()))] = one.value
    except (ValueError, KeyError) as error:
        raise StagelineError(f"its /metrics are not in Prometheus' text format ({error})") from error
    if not any(name.startswith("stageline_") for name, _ in values):
        raise StagelineError("it answers, but is not stageline serve: its /metrics have no stageline_ names")
    histograms = {
        key: Buckets(tuple(sorted(counts)), np.array([counts[bound] for bound in sorted(counts)]))
        for key, counts in below.items()
    }
    return Sample(at_s, values, histograms)


def scrape(address: str) -> Sample:
    """Read `address`/metrics once. StagelineError if that fails."""
    try:
        with OPENER.open(f"{address}/metrics", timeout=_TIMEOUT_S) as answer:
            text = _read(answer).decode()
    except urllib.error.HTTPError as error:
        raise StagelineError(f"the service at {address} answers {error.code} to /metrics") from error
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StagelineError(f"nothing answers at {address} ({getattr(reason, 'strerror', None) or reason})") from error
    return parsed(text, time.time())


def _read(answer: HTTPResponse) -> bytes:
    """The body, at most _LIMIT_BYTES of it. TimeoutError for one that only trickles."""
    read, until = bytearray(), time.monotonic() + _WHOLE_S
    while len(read) < _LIMIT_BYTES and (piece := answer.read1(_LIMIT_BYTES - len(read))):
        read += piece
        if time.monotonic() > until:
            raise TimeoutError(f"its /metrics did not end within {_WHOLE_S:g} s")
    return bytes(read)


def percentile(before: Buckets | None, after: Buckets | None, share: float) -> float | None:
    """A percentile (`share` 0.5: the median) of the times, in seconds, that were counted between two readings.

    As Prometheus' histogram_quantile: interpolated within the bucket, at most the largest finite bound. None where the
    readings do not belong together (a restart between them), or hold fewer than 1 / (1 - share) times.
    """
    counted = grown(before, after)
    if counted is None or after is None or counted[-1] < 1 / (1 - share) - 1e-9:
        return None
    place = int(np.searchsorted(counted, share * counted[-1]))
    if math.isinf(after.bounds[place]):
        return after.bounds[place - 1] if place else None
    low, low_count = (after.bounds[place - 1], counted[place - 1]) if place else (0.0, 0.0)
    within = (share * counted[-1] - low_count) / (counted[place] - low_count)
    return float(low + (after.bounds[place] - low) * within)


def grown(before: Buckets | None, after: Buckets | None) -> npt.NDArray[np.float64] | None:
    """The counts that came between two readings, float64 [bounds]; None where they do not belong together."""
    if before is None or after is None or before.bounds != after.bounds:
        return None
    counted = after.counts - before.counts
    return None if (counted < 0).any() else counted


def _has(labels: tuple[tuple[str, str], ...], fixed: Mapping[str, str]) -> bool:
    return fixed.items() <= dict(labels).items()

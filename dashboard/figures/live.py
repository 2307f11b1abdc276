"""A running service over the last minutes: a thread reads its /metrics each second; figures follow from them."""

import itertools
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from stageline.models.errors import StagelineError
from stageline.runtime.bench.energy import Meters

PERIOD_S, KEPT_S = 1.0, 300
_UNWATCHED_S = 60.0  # the thread ends after this time without a reader
_TIMEOUT_S = 3.0
_LIMIT_BYTES = 4 * 1024**2

ENERGY, DEVICE_MEMORY = "machine_energy_joules", "machine_device_memory_bytes"
"""Counters of this machine, added to the service's metrics if the service runs here."""
_HERE = {"127.0.0.1", "localhost", "::1"}

Key = tuple[str, tuple[tuple[str, str], ...]]
"""The name of a metric and its sorted labels."""


@dataclass(frozen=True)
class Sample:
    """All metrics at a time (seconds since the epoch)."""

    at_s: float
    values: Mapping[Key, float]

    def get(self, name: str, **labels: str) -> float | None:
        """The value of a metric; None if the service does not report it."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def labels(self, name: str, label: str, **fixed: str) -> list[str]:
        """The values of a label of a metric, for fixed other labels."""
        found = [dict(labels) for metric, labels in self.values if metric == name]
        return [one[label] for one in found if label in one and fixed.items() <= one.items()]


def parsed(text: str, at_s: float) -> Sample:
    """Parse Prometheus' text format. StagelineError if `text` is not a service's metrics."""
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        raise StagelineError(f"its /metrics are not in Prometheus' text format ({error})") from error
    values = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    if not any(name.startswith("stageline_") for name, _ in values):
        raise StagelineError("it answers, but is not stageline serve: its /metrics have no stageline_ names")
    return Sample(at_s, values)


def scrape(url: str) -> Sample:
    """Read `url`/metrics once. StagelineError if that fails."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise StagelineError(f"{url!r} is not an address; give one like http://127.0.0.1:8000")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read(_LIMIT_BYTES).decode()
    except urllib.error.HTTPError as error:
        raise StagelineError(f"{url} answers {error.code} to /metrics") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StagelineError(f"nothing answers at {url} ({getattr(reason, 'strerror', None) or reason})") from error
    return parsed(text, time.time())


class Watcher:
    """Reads a service each second while a page shows it, and keeps the last minutes. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=int(KEPT_S / PERIOD_S))
        self._error: str | None = None
        self._read_at = 0.0
        self._thread: threading.Thread | None = None
        self._meters = Meters() if urlsplit(url).hostname in _HERE else None

    def look(self) -> tuple[list[Sample], str | None]:
        """The samples so far, oldest first, and the error of the last reading, if it failed."""
        with self._lock:
            self._read_at = time.monotonic()
            starts = self._thread is None
            if starts:
                self._thread = threading.Thread(target=self._watch, name=f"watch {self.url}", daemon=True)
        if starts:
            self._read()
            assert self._thread is not None
            self._thread.start()
        with self._lock:
            return list(self._samples), self._error

    def _read(self) -> None:
        try:
            sample, error = self._with_meters(scrape(self.url)), None
        except StagelineError as failure:
            sample, error = None, str(failure)
        with self._lock:
            self._error = error
            if sample is not None:
                self._samples.append(sample)

    def _with_meters(self, sample: Sample) -> Sample:
        values: dict[Key, float] = dict(sample.values)
        if self._meters is not None and self._meters.measures_energy:
            values[ENERGY, ()] = self._meters.energy_j()
        if self._meters is not None and self._meters.has_gpu:
            values[DEVICE_MEMORY, ()] = float(self._meters.device_memory_bytes())
        return Sample(sample.at_s, values)

    def _watch(self) -> None:
        due = time.monotonic() + PERIOD_S
        while True:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + PERIOD_S, time.monotonic())
            with self._lock:
                if time.monotonic() - self._read_at > _UNWATCHED_S:
                    self._thread = None
                    return
            self._read()


def models(sample: Sample) -> list[str]:
    """The models of the service."""
    return sorted(set(sample.labels("stageline_stage_runs_total", "model")))


def generates(sample: Sample, model: str) -> bool:
    """Whether the model generates text (otherwise it embeds)."""
    return sample.get("stageline_slots", model=model) is not None


def stages(sample: Sample, model: str) -> list[str]:
    """The stage numbers of the model."""
    return sorted(sample.labels("stageline_stage_runs_total", "stage", model=model), key=int)


def rates(samples: Sequence[Sample], name: str, **labels: str) -> list[tuple[float, float]]:
    """A counter's growth per second between samples, by time of the later one. A restarted service leaves a gap."""
    found = []
    for before, after in itertools.pairwise(samples):
        low, high = before.get(name, **labels), after.get(name, **labels)
        if low is not None and high is not None and high >= low and after.at_s > before.at_s:
            found.append((after.at_s, (high - low) / (after.at_s - before.at_s)))
    return found


def series(samples: Sequence[Sample], name: str, **labels: str) -> list[tuple[float, float]]:
    """The values of a gauge, by time."""
    return [(s.at_s, value) for s in samples if (value := s.get(name, **labels)) is not None]


def smoothed(points: Sequence[tuple[float, float]], over: int = 3) -> list[tuple[float, float]]:
    """The mean of each value and those before it, `over` values in all."""
    return [
        (at, sum(v for _, v in points[max(0, n - over + 1) : n + 1]) / min(over, n + 1))
        for n, (at, _) in enumerate(points)
    ]


def rows(lines: Iterable[tuple[str, Sequence[tuple[float, float]]]], now_s: float) -> list[dict[str, Any]]:
    """Named lines as rows of a chart; time relative to now, in seconds."""
    return [
        {"ago_s": round(at - now_s, 2), "value": value, "line": name}
        for name, points in lines
        for at, value in points
        if at >= now_s - KEPT_S
    ]


@dataclass(frozen=True)
class Now:
    """The headline numbers; None if the service does not report them."""

    throughput_per_s: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    waiting: float | None
    running: float | None
    slots: float | None
    memory_bytes: float | None
    device_memory_bytes: float | None
    cores: float | None
    power_w: float | None


def latest(samples: Sequence[Sample], model: str) -> Now:
    """The headline numbers of the last sample; rates over the last three seconds."""
    last, recent = samples[-1], samples[-4:]
    counter = "stageline_generated_tokens_total" if generates(last, model) else "stageline_requests_total"
    labels = {"model": model} if generates(last, model) else {"model": model, "outcome": "done"}

    def mean(points: list[tuple[float, float]]) -> float | None:
        return sum(value for _, value in points) / len(points) if points else None

    def gauge(name: str, **more: str) -> float | None:
        return last.get(f"stageline_{name}", model=model, **more)

    return Now(
        mean(rates(recent, counter, **labels)),
        gauge("ttft_seconds", quantile="0.5"),
        gauge("ttft_seconds", quantile="0.99"),
        gauge("tpot_seconds", quantile="0.5"),
        gauge("queue_waiting"),
        gauge("slots_running"),
        gauge("slots"),
        last.get("process_resident_memory_bytes"),
        last.get(DEVICE_MEMORY),
        mean(rates(recent, "process_cpu_seconds_total")),
        mean(rates(recent, ENERGY)),
    )

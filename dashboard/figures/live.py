"""A running service over the last minutes: a thread reads its metrics each second; cards and panels follow."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stageline.dashboard.addresses import is_here
from stageline.dashboard.figures.metrics import Key, Sample, grown, percentile, scrape
from stageline.models.errors import StagelineError
from stageline.runtime.bench.energy import Meters

PERIOD_S, KEPT_S = 1.0, 900
RANGES = {"1 min": 60, "5 min": 300, "15 min": 900}
"""What a page can show, in seconds."""
LATEST_S = 60.0
"""The time that cards are of."""
_POINTS = 120  # of a line
_TRAILING_S = 30.0  # that a point of a percentile's line is of
_UNWATCHED_S = 60.0  # the thread ends after this time without a reader

ENERGY, DEVICE_MEMORY = "machine_energy_joules", "machine_device_memory_bytes"
"""Counters of this machine, added to the service's metrics if the service runs here."""
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Points = list[tuple[float, float]]
"""Values by time (seconds since the epoch)."""


class Watcher:
    """Reads a service each second while a page shows it, and keeps the last minutes. Thread-safe."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=int(KEPT_S / PERIOD_S))
        self._error: str | None = None
        self._read_at = 0.0
        self._thread: threading.Thread | None = None
        self._meters = Meters() if is_here(address) else None

    def look(self) -> tuple[list[Sample], str | None]:
        """The samples so far, oldest first, and the error of the last reading, if it failed."""
        with self._lock:
            self._read_at = time.monotonic()
            starts = self._thread is None
            if starts:
                self._thread = threading.Thread(target=self._watch, name=f"watch {self.address}", daemon=True)
        if starts:
            self._read()
            assert self._thread is not None
            self._thread.start()
        with self._lock:
            return list(self._samples), self._error

    def _read(self) -> None:
        try:
            sample, error = self._with_meters(scrape(self.address)), None
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
        return Sample(sample.at_s, values, sample.histograms)

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


def growth(samples: Sequence[Sample], read: Callable[[Sample], float | None]) -> Points:
    """A counter's growth per second between samples, by time of the later one. A restarted service leaves a gap."""
    found = []
    for before, after in itertools.pairwise(samples):
        low, high = read(before), read(after)
        if low is not None and high is not None and high >= low and after.at_s > before.at_s:
            found.append((after.at_s, (high - low) / (after.at_s - before.at_s)))
    return found


def thinned(samples: Sequence[Sample], range_s: float, now_s: float) -> list[Sample]:
    """The last sample of each of about `_POINTS` equal steps of the last `range_s` seconds: a line has as many points
    in any range. Steps lie at multiples of their length: points stay where they are while time goes on."""
    step_s = max(PERIOD_S, range_s / _POINTS)
    last = {int(sample.at_s // step_s): sample for sample in samples if sample.at_s >= now_s - range_s - step_s}
    return list(last.values())


@dataclass(frozen=True)
class Panel:
    """A chart of the page: lines of values in one unit. `top`: the end of its axis, if it is fixed."""

    title: str
    unit: str
    lines: dict[str, Points]
    top: float | None = None


def panels(samples: Sequence[Sample], model: str) -> list[Panel]:
    """What a page draws of thinned samples; lines without values included, so that a page keeps its form."""
    last = samples[-1]

    def counter(name: str, **labels: str) -> Points:
        return growth(samples, lambda sample: sample.get(f"stageline_{name}_total", model=model, **labels))

    def gauge(name: str, **labels: str) -> Points:
        return [(s.at_s, v) for s in samples if (v := s.get(name, **labels)) is not None]

    generating = generates(last, model)
    found = [
        Panel(
            "Throughput",
            "tokens/s",
            {"generated": counter("generation_tokens"), "prompts": counter("prompt_tokens")},
        )
    ] * generating
    found += [
        Panel(
            "Requests",
            "requests/s",
            {
                "done": counter("requests", outcome="done"),
                "failed": counter("requests", outcome="failed"),
                "cancelled": counter("requests", outcome="cancelled"),
                "refused (HTTP 4xx, 5xx)": growth(samples, refused),
            },
        ),
        _times(samples, "End-to-end latency", "e2e_request_latency", model),
    ]
    if generating:
        used = [(at, 100 * v) for at, v in gauge("stageline_kv_cache_usage_perc", model=model)]
        found += [
            _times(samples, "Time to first token, TTFT", "time_to_first_token", model),
            _times(samples, "Time per output token, TPOT", "inter_token_latency", model),
            _times(samples, "Time in the queue", "request_queue_time", model),
            Panel(
                "Slots and queue",
                "sequences",
                {
                    "running": gauge("stageline_num_requests_running", model=model),
                    "waiting": gauge("stageline_num_requests_waiting", model=model),
                },
            ),
            Panel("KV cache", "% filled", {"used": used}, 100.0),
        ]
    busy = {
        f"stage {n}": [(at, 100 * min(1.0, v)) for at, v in counter("stage_busy_seconds", stage=n)]
        for n in stages(last, model)
    }
    memory = [(at, v / 1e6) for at, v in gauge("process_resident_memory_bytes")]
    return [*found, Panel("Utilisation", "% of the time", busy, 100.0), Panel("Memory", "MB", {"process": memory})]


def panel_rows(found: Sequence[Panel], range_s: float, now_s: float) -> Iterator[dict[str, Any]]:
    """Rows of the chart: `at` in ms since the epoch. Two rows of a panel are of no line: the ends of its time axis."""
    for panel in found:
        for at_s in (now_s - range_s, now_s):
            yield {"at": round(at_s * 1e3), "panel": panel.title, "line": None, "value": 0.0}
        for line, points in panel.lines.items():
            for at_s, value in points:
                if at_s >= now_s - range_s:
                    yield {"at": round(at_s * 1e3), "panel": panel.title, "line": line, "value": round(value, 4)}


def refused(sample: Sample) -> float | None:
    """The number of HTTP responses with an error, of all models."""
    statuses = set(sample.labels("stageline_http_requests_total", "status"))
    wrong = [sample.total("stageline_http_requests_total", status=one) or 0.0 for one in statuses if one[0] in "45"]
    return sum(wrong)


def _times(samples: Sequence[Sample], title: str, name: str, model: str) -> Panel:
    """The percentiles of a histogram, in milliseconds, or in seconds if any is of a second or more."""
    lines: dict[str, Points] = {key: [] for key in PERCENTILES}
    read = [sample.buckets(f"stageline_{name}_seconds", model=model) for sample in samples]
    first = 0
    for last, sample in enumerate(samples):
        while first < last - 1 and sample.at_s - samples[first].at_s > _TRAILING_S:
            first += 1
        for key, share in PERCENTILES.items():
            value = percentile(read[first], read[last], share)
            if value is not None:
                lines[key].append((sample.at_s, value))
    if any(value >= 1 for points in lines.values() for _, value in points):
        return Panel(title, "s", lines)
    return Panel(title, "ms", {key: [(at, value * 1e3) for at, value in points] for key, points in lines.items()})


@dataclass(frozen=True)
class Now:
    """The cards: rates and percentiles of the last `over_s` seconds, in which `ended` requests ended well and `errors`
    did not; all else as of the last sample. None where the service does not report it, or too few requests ended."""

    over_s: float
    ended: float
    errors: float
    throughput_per_s: float | None
    latency_p50_s: float | None
    latency_p99_s: float | None
    ttft_p50_s: float | None
    tpot_p50_s: float | None
    queue_p50_s: float | None
    waiting: float | None
    running: float | None
    slots: float | None
    cache_usage: float | None
    memory_bytes: float | None
    device_memory_bytes: float | None
    cores: float | None
    power_w: float | None


def latest(samples: Sequence[Sample], model: str) -> Now:
    """The cards of the last sample."""
    last = samples[-1]
    first = next(sample for sample in samples if sample.at_s >= last.at_s - LATEST_S)
    span = (first, last) if last is not first else (last,)

    def rate(read: Callable[[Sample], float | None]) -> float | None:
        return next((value for _, value in growth(span, read)), None)

    def time_s(name: str, share: float) -> float | None:
        name = f"stageline_{name}_seconds"
        return percentile(first.buckets(name, model=model), last.buckets(name, model=model), share)

    def gauge(name: str) -> float | None:
        return last.get(f"stageline_{name}", model=model)

    over_s = last.at_s - first.at_s
    unit = "generation_tokens" if generates(last, model) else "requests"
    labels = {} if generates(last, model) else {"outcome": "done"}
    latency = "stageline_e2e_request_latency_seconds"
    counted = grown(first.buckets(latency, model=model), last.buckets(latency, model=model))
    errors = [
        rate(lambda sample: sample.get("stageline_requests_total", model=model, outcome="failed")),
        rate(refused),
    ]
    return Now(
        over_s,
        0.0 if counted is None else float(counted[-1]),
        over_s * max(value or 0.0 for value in errors),
        rate(lambda sample: sample.get(f"stageline_{unit}_total", model=model, **labels)),
        time_s("e2e_request_latency", 0.5),
        time_s("e2e_request_latency", 0.99),
        time_s("time_to_first_token", 0.5),
        time_s("inter_token_latency", 0.5),
        time_s("request_queue_time", 0.5),
        gauge("num_requests_waiting"),
        gauge("num_requests_running"),
        gauge("slots"),
        gauge("kv_cache_usage_perc"),
        last.get("process_resident_memory_bytes"),
        last.get(DEVICE_MEMORY),
        rate(lambda sample: sample.get("process_cpu_seconds_total")),
        rate(lambda sample: sample.get(ENERGY)),
    )

"""From requests to figures: throughput, percentiles, goodput, and the use of the stages."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from stageline.runtime.bench.client import DriveResult
from stageline.runtime.bench.records import ANSWERED, CANCELLED, Figure, Requests, Slo
from stageline.runtime.stages.lanes import StageStats
from stageline.runtime.stages.recorder import Span

Better = Literal["higher", "lower"] | None
PERCENTILES = (50, 90, 95, 99)
_TIMES = {
    "latency": "from intended arrival to end",
    "ttft": "from intended arrival to first token",
    "tpot": "time per token after the first",
    "itl": "between one token and the next",
}
MEANINGS: dict[str, tuple[str, Better, str]] = {
    "requests_per_s": (
        "requests/s",
        "higher",
        "requests answered, over the time from the beginning of the repeat to the last end",
    ),
    "samples_per_s": ("samples/s", "higher", "texts (rows) answered"),
    "tokens_per_s": ("tokens/s", "higher", "tokens drawn; tokens read if the model does not generate"),
    "tokens_in_per_s": ("tokens/s", "higher", "tokens read"),
    "tokens_out_per_s": ("tokens/s", "higher", "tokens drawn"),
    "goodput_per_s": ("requests/s", "higher", "requests answered within the SLO"),
    "slo_share": ("", "higher", "share of all requests that were answered within the SLO"),
    **{
        f"{name}_{which}_s": ("s", "lower", f"{meaning}: {which}")
        for name, meaning in _TIMES.items()
        for which in (*(f"p{p}" for p in PERCENTILES), "max", "mean")
    },
    "failed_share": ("", "lower", "share of requests that were not answered"),
    "send_delay_p99_s": ("s", None, "how late the load generator sent requests: p99"),
    "in_flight": ("requests", None, "requests sent and not ended, on average"),
    "queue_depth": ("requests", None, "requests waiting for their first stage, on average"),
    "bubble_ratio": ("", "lower", "share of the stages' time that was idle while requests were in progress"),
    "hop_overhead_s": ("s", "lower", "from the end of a stage to the start of the next one, if that was free: median"),
    "host_memory_bytes": ("bytes", "lower", "resident memory of this process, max"),
    "device_memory_bytes": ("bytes", "lower", "memory used on the GPUs, max"),
    "energy_j": ("J", "lower", "energy of the machine, as far as it has counters"),
    "power_w": ("W", "lower", "power of the machine, on average"),
    "energy_per_token_j": ("J/token", "lower", "energy per token, read or drawn, of answered requests"),
}
"""Name of a figure -> unit, which direction is better, and meaning."""


@dataclass(frozen=True)
class StageUse:
    """How the stages were used during a repeat; one value per stage."""

    busy_s: tuple[float, ...]
    copy_s: tuple[float, ...]
    runs: tuple[int, ...]

    @classmethod
    def between(cls, before: Sequence[StageStats], after: Sequence[StageStats]) -> "StageUse":
        """The difference of two snapshots."""
        pairs = list(zip(before, after, strict=True))
        return cls(
            tuple(b.busy_s - a.busy_s for a, b in pairs),
            tuple(b.copy_s - a.copy_s for a, b in pairs),
            tuple(b.runs - a.runs for a, b in pairs),
        )


def of_requests(answers: DriveResult, rows: int, slo: Slo) -> dict[str, float]:
    """Figures of one repeat that follow from its requests alone; those without a value are left out."""
    requests, seconds = answers.requests, answers.seconds or float("inf")
    good = requests.status == ANSWERED
    count, asked = int(good.sum()), len(requests)
    tokens_in, tokens_out = (int(column[good].sum()) for column in (requests.tokens_in, requests.tokens_out))
    generates = bool(tokens_out)
    found = {
        "requests_per_s": count / seconds,
        "samples_per_s": count * rows / seconds,
        "tokens_per_s": (tokens_out if generates else tokens_in) / seconds,
        "tokens_in_per_s": tokens_in / seconds,
        "failed_share": 1 - count / asked if asked else 0.0,
        "in_flight": float((requests.latency_s - requests.sent_s).sum()) / seconds,
    }
    if generates:
        found["tokens_out_per_s"] = tokens_out / seconds
    if slo.bounded:
        kept = int((good & within(requests, slo)).sum())
        found["goodput_per_s"], found["slo_share"] = kept / seconds, kept / asked if asked else 0.0
    for name, values in {**times_s(requests), "itl": np.array(answers.gaps_s, np.float32)}.items():
        found.update(_spread(name, values))
    if asked:
        found["send_delay_p99_s"] = float(np.percentile(requests.sent_s, 99))
    return found


def times_s(requests: Requests) -> dict[str, npt.NDArray[np.float32]]:
    """The latency, TTFT and TPOT of requests, without NaN.

    A request that was cancelled for want of an answer took longer than all that were answered: its latency and TTFT are
    infinite, so that a percentile among such requests is not known, and the others are not too small. Failed requests
    have no times.
    """
    good, late = requests.status == ANSWERED, requests.status == CANCELLED
    times = {"latency": requests.latency_s, "ttft": requests.first_token_s, "tpot": requests.tpot_s}
    known = {name: values[good & ~np.isnan(values)] for name, values in times.items()}
    never = np.full(int(late.sum()), np.inf, np.float32)
    return {
        name: values if name == "tpot" or not len(values) else np.concatenate([values, never])
        for name, values in known.items()
    }


def within(requests: Requests, slo: Slo) -> npt.NDArray[np.bool_]:
    """Which requests kept every bound; a time that a request lacks counts as kept."""
    kept = np.ones(len(requests), bool)
    for bound, times in (
        (slo.latency_s, requests.latency_s),
        (slo.ttft_s, requests.first_token_s),
        (slo.tpot_s, requests.tpot_s),
    ):
        if bound is not None:
            kept &= ~(times > bound)
    return kept


def active_s(answers: DriveResult) -> float:
    """Seconds in which at least one request was in progress."""
    began = answers.requests.intended_s + answers.requests.sent_s
    ended = answers.requests.intended_s + answers.requests.latency_s
    order = np.argsort(began)
    total, reached = 0.0, -np.inf
    for begin, end in zip(began[order].tolist(), ended[order].tolist(), strict=True):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def bubble_ratio(use: StageUse, active: float) -> float | None:
    """Share of the stages' active time in which they were idle, 0 to 1; None if `active` (seconds) is 0."""
    if active <= 0:
        return None
    return min(1.0, max(0.0, 1 - sum(use.busy_s) / (len(use.busy_s) * active)))


def hop_overhead_s(spans: Sequence[Span]) -> float | None:
    """Median time from the end of a stage to the start of the next one, if that was idle; None if it never was."""
    by_stage: dict[int, list[Span]] = {}
    for span in spans:
        if span.kind != "copy":
            by_stage.setdefault(span.stage, []).append(span)
    hops = []
    for stage, here in by_stage.items():
        arrived = {span.micro_batch: span.ended_s for span in by_stage.get(stage - 1, ())}
        for before, span in itertools.pairwise(here):
            left_at = arrived.get(span.micro_batch)
            if left_at is not None and before.ended_s <= left_at:
                hops.append(span.began_s - left_at)
    return float(np.median(hops)) if hops else None


def over_repeats(repeats: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """A figure for each name that all repeats have."""
    names = [name for name in MEANINGS if repeats and all(name in repeat for repeat in repeats)]
    return {
        name: Figure.of(unit, better, [repeat[name] for repeat in repeats])
        for name in names
        for unit, better, _ in [MEANINGS[name]]
    }


def _spread(name: str, values: npt.NDArray[np.float32]) -> dict[str, float]:
    if not len(values):
        return {}
    with np.errstate(invalid="ignore"):  # between two infinite values
        percentiles = np.percentile(values, PERCENTILES).tolist()
    found = {f"{name}_p{p}_s": value for p, value in zip(PERCENTILES, percentiles, strict=True)}
    found |= {f"{name}_max_s": float(values.max()), f"{name}_mean_s": float(values.mean(dtype=np.float64))}
    return {key: value for key, value in found.items() if math.isfinite(value)}

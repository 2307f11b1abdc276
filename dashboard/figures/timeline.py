"""Data of the Timeline page: the spans and bubbles of a window, and the use of the stages over the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from stageline.runtime.bench.records import Timeline
from stageline.runtime.stages.recorder import WINDOW, Span

MAX_SPANS = 2000  # drawn at a time
_FIRST_MICRO_BATCHES = 40  # in the first window
_BINS = 160
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Spans as columns, by start time."""

    spans: tuple[Span, ...]
    stage: npt.NDArray[np.int64]
    micro_batch: npt.NDArray[np.int64]
    began_s: Floats
    ended_s: Floats
    copying: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, timeline: Timeline) -> "Table":
        """The table of a recorded timeline."""
        spans = tuple(sorted(timeline.spans, key=lambda span: span.began_s))
        return cls(
            spans,
            np.array([span.stage for span in spans], np.int64),
            np.array([span.micro_batch for span in spans], np.int64),
            np.array([span.began_s for span in spans], np.float64),
            np.array([span.ended_s for span in spans], np.float64),
            np.array([span.kind == "copy" for span in spans], np.bool_),
        )

    @cached_property
    def bubbles(self) -> Floats:
        """See `bubbles`."""
        return bubbles(self)

    @cached_property
    def stages(self) -> list[int]:
        """The stages that have spans."""
        return sorted(set(self.stage.tolist()))

    @property
    def end_s(self) -> float:
        """When the last span ended."""
        return float(self.ended_s.max()) if len(self.ended_s) else 0.0

    @property
    def begin_s(self) -> float:
        """When the first span began."""
        return float(self.began_s[0]) if len(self.began_s) else 0.0


def first_window(table: Table) -> tuple[float, float]:
    """The window to show first: consecutive micro-batches near the middle, where the pipeline is full.

    The middle itself may lie between two repeats, while other contenders ran, or where the recorder dropped
    micro-batches. So only stretches that took no longer than the median one are considered.
    """
    numbers, begins, ends = _micro_batches(table)
    count = min(_FIRST_MICRO_BATCHES, len(numbers))
    first = np.arange(len(numbers) - count + 1)
    last = first + count - 1
    took = np.maximum.accumulate(ends)[last] - begins[first]
    whole = np.flatnonzero(numbers[last] - numbers[first] == count - 1)
    known = whole if len(whole) else first
    usual = known[took[known] <= np.median(took[known])]
    start = usual[np.argmin(np.abs(usual - len(first) // 2))]
    chosen = np.isin(table.micro_batch, numbers[start : start + count])
    return float(table.began_s[chosen].min()), float(table.ended_s[chosen].max())


def bounded(table: Table, low_s: float, high_s: float) -> tuple[float, float]:
    """The part of a window that lies in the recording: of the same length where that fits, at least a thousandth."""
    begin, end = table.begin_s, table.end_s
    length = min(max(high_s - low_s, (end - begin) / 1000), end - begin)
    low = min(max(low_s, begin), end - length)
    return low, low + length


def around_longest_bubble(table: Table) -> tuple[float, float] | None:
    """A window with the longest bubble in its middle third; None where no stage waited."""
    if not len(table.bubbles):
        return None
    _, low, high = table.bubbles[np.argmax(table.bubbles[:, 2] - table.bubbles[:, 1])].tolist()
    return bounded(table, low - (high - low), high + (high - low))


def _micro_batches(table: Table) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """The numbers of the micro-batches, with the start of the first and the end of the last span of each."""
    order = np.argsort(table.micro_batch, kind="stable")
    numbers, first = np.unique(table.micro_batch[order], return_index=True)
    if not len(numbers):
        return numbers, np.zeros(0), np.zeros(0)
    begins, ends = table.began_s[order], table.ended_s[order]
    return numbers, np.minimum.reduceat(begins, first), np.maximum.reduceat(ends, first)


def active_periods(table: Table) -> list[tuple[float, float]]:
    """Periods (begin, end) in which any micro-batch was between its first and its last span."""
    _, begins, ends = _micro_batches(table)
    if not len(begins):
        return []
    by_time = np.argsort(begins, kind="stable")
    begins, ends = begins[by_time], np.maximum.accumulate(ends[by_time])
    breaks = np.flatnonzero(begins[1:] > ends[:-1]) + 1
    return list(
        zip(
            begins[np.concatenate([[0], breaks])].tolist(),
            ends[np.concatenate([breaks - 1, [len(ends) - 1]])].tolist(),
            strict=True,
        )
    )


def bubbles(table: Table) -> Floats:
    """[bubbles, 3]: stage, begin and end of each period in which a stage waited while micro-batches were in progress.

    Windows of micro-batches that the recorder dropped do not count: nothing is known about them.
    """
    busy = active_periods(table)
    starts, stops = (np.array([pair[n] for pair in busy]) for n in (0, 1))
    found = [np.zeros((0, 3))]
    for stage in table.stages:
        mine = np.flatnonzero(table.stage == stage)
        begins, ends = table.began_s[mine], np.maximum.accumulate(table.ended_s[mine])
        windows = table.micro_batch[mine] // WINDOW
        gaps = np.flatnonzero((begins[1:] > ends[:-1]) & (np.abs(np.diff(windows)) <= 1))
        low, high = ends[gaps], begins[gaps + 1]
        first = np.searchsorted(stops, low, side="right")  # of the periods that each gap meets
        many = np.maximum(np.searchsorted(starts, high) - first, 0)
        gap = np.repeat(np.arange(len(gaps)), many)
        met = np.arange(len(gap)) + np.repeat(first - np.cumsum(many) + many, many)
        parts = np.column_stack(
            [np.full(len(gap), stage), np.maximum(low[gap], starts[met]), np.minimum(high[gap], stops[met])]
        )
        found.append(parts[parts[:, 2] > parts[:, 1]])
    return np.concatenate(found)


def span_rows(table: Table, low_s: float, high_s: float) -> tuple[list[dict[str, Any]], bool]:
    """The spans of a window for the chart, and whether there are more than can be drawn."""
    chosen = np.flatnonzero((table.ended_s > low_s) & (table.began_s < high_s))
    rows = []
    for place in chosen[:MAX_SPANS]:
        span = table.spans[place]
        rows.append(
            {
                "stage": f"stage {span.stage}",
                "kind": span.kind,
                "begin_ms": span.began_s * 1e3,
                "end_ms": span.ended_s * 1e3,
                "ms": (span.ended_s - span.began_s) * 1e3,
                "shape": f"{span.rows} × {span.tokens} tokens",
                "micro_batch": span.micro_batch,
                "requests": _requests(span.requests),
            }
        )
    return rows, len(chosen) > MAX_SPANS


def bubble_rows(table: Table, low_s: float, high_s: float) -> list[dict[str, Any]]:
    """The bubbles of a window for the chart; only the longest if there are too many."""
    inside = table.bubbles[(table.bubbles[:, 2] > low_s) & (table.bubbles[:, 1] < high_s)]
    longest = inside[np.argsort(inside[:, 1] - inside[:, 2], kind="stable")[:MAX_SPANS]]
    return [
        {
            "stage": f"stage {stage:.0f}",
            "kind": "bubble",
            "begin_ms": begin * 1e3,
            "end_ms": end * 1e3,
            "ms": (end - begin) * 1e3,
        }
        for stage, begin, end in longest.tolist()
    ]


@dataclass(frozen=True)
class StageShare:
    """How a stage spent the seconds in which micro-batches were in progress."""

    stage: int
    busy_s: float
    copy_s: float
    bubble_s: float

    @property
    def bubble_ratio(self) -> float:
        """The share of waiting, 0 to 1."""
        return self.bubble_s / ((self.busy_s + self.copy_s + self.bubble_s) or 1.0)


def shares(table: Table) -> list[StageShare]:
    """The shares of each stage, over the whole recording."""
    taken, waited = table.ended_s - table.began_s, table.bubbles[:, 2] - table.bubbles[:, 1]
    return [
        StageShare(
            stage,
            float(taken[(table.stage == stage) & ~table.copying].sum()),
            float(taken[(table.stage == stage) & table.copying].sum()),
            float(waited[table.bubbles[:, 0] == stage].sum()),
        )
        for stage in table.stages
    ]


def utilisation_rows(table: Table) -> list[dict[str, Any]]:
    """Percent of time in which each stage computed, in equal slices of the whole recording."""
    begin, end = table.begin_s, table.end_s
    edges = np.linspace(begin, max(end, begin + 1e-9), _BINS + 1)
    rows = []
    for stage in table.stages:
        mine = (table.stage == stage) & ~table.copying
        done = _passed(table.began_s[mine], edges) - _passed(table.ended_s[mine], edges)
        percent = 100 * np.clip(np.diff(done) / np.diff(edges), 0, 1)
        rows += [
            {"stage": f"stage {stage}", "at_s": float(at), "percent": float(value)}
            for at, value in zip((edges[:-1] + edges[1:]) / 2, percent, strict=True)
        ]
    return rows


def _passed(times: Floats, edges: Floats) -> Floats:
    """For each edge, the sum of the seconds since each earlier one of `times`."""
    times = np.sort(times)
    sums, before = np.concatenate([[0.0], np.cumsum(times)]), np.searchsorted(times, edges)
    return np.asarray(before * edges - sums[before])


def _requests(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > 8 else shown or "-"

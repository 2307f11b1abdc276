"""Which loads a run measures and how often: those that were asked for, or a sweep that searches for the limits.

A sweep doubles the requests at a time until no contender's throughput grows any more. Then, for each contender, it
searches the largest rate within the SLO: from half of its largest throughput down by halves, or up by bisection, until
the rates that hold and do not hold are within RESOLUTION. For one that surely fails with a single request at a time no
rate is tried. Every contender is measured at each load, unless that is more than SWAMPED times its largest throughput.

Each load asks one question: is the throughput more than GROWN times that of half the load; is the share of requests
within the SLO above its bound? It is repeated until the answer is sure (`capacity.settled`, `capacity.held`), at least
twice, and at most as often as the run's settings say; then the mean decides. A rate that was chosen for another
contender, and lies beside what this one's other rates say already, asks nothing: it is measured twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from stageline.runtime.bench.capacity import FAILING, bracket, held, settled
from stageline.runtime.bench.records import Load, RunSettings, Slo

GROWN = 1.05
RESOLUTION = 1.1
SWAMPED = 1.25
LEAST_REPEATS = 2
MOST_AT_A_TIME = 1024
_LEAST_SHARE = 1 / 64  # of the largest throughput: the smallest rate that is tried
_LEAST_REQUESTS = 0.5  # in the seconds of a repeat: of a smaller rate, a repeat would only wait for one request


class Loads(Protocol):
    """Chooses the loads of a run. The runner takes each from the iterator, repeats it for every contender while `again`
    says so, reports each repeat by `measured`, and then takes the next."""

    expected: int
    """About how many repeats each contender will have."""

    def __iter__(self) -> Iterator[Load]: ...

    def again(self, load: Load, contender: str) -> bool:
        """Whether to measure this contender under this load, for the first time or once more."""
        ...

    def measured(self, load: Load, contender: str, requests: int, figures: Mapping[str, float]) -> None:
        """Take note of a repeat: its requests and figures."""
        ...


class Listed:
    """The loads in the settings, each repeated as often as they say."""

    def __init__(self, settings: RunSettings) -> None:
        self._loads, self._repeats = settings.loads, settings.repeats
        self.expected = len(self._loads) * self._repeats
        self._done: dict[tuple[Load, str], int] = {}

    def __iter__(self) -> Iterator[Load]:
        return iter(self._loads)

    def again(self, load: Load, contender: str) -> bool:
        """See `Loads`."""
        return self._done.get((load, contender), 0) < self._repeats

    def measured(self, load: Load, contender: str, requests: int, figures: Mapping[str, float]) -> None:
        """See `Loads`."""
        self._done[load, contender] = self._done.get((load, contender), 0) + 1


class Sweep:
    """The loads of a sweep of these contenders; see the top of this file. `at_rates`: what its rates have in common."""

    def __init__(self, contenders: Sequence[str], at_rates: Load, slo: Slo, most_repeats: int, seconds: float) -> None:
        self._contenders, self._slo, self._most = tuple(contenders), slo, max(LEAST_REPEATS, most_repeats)
        self._at_rates, self._seconds = at_rates, seconds
        self.expected = 3 * (6 + (5 * len(self._contenders) if slo.bounded else 0))
        self._seen: dict[tuple[Load, str], list[Mapping[str, float]]] = {}
        self._requests: dict[tuple[Load, str], int] = {}

    def __iter__(self) -> Iterator[Load]:
        yield from self._closed_loops()
        if self._slo.bounded:
            for contender in self._contenders:
                yield from self._rates(contender)

    def again(self, load: Load, contender: str) -> bool:
        """See `Loads`."""
        done = len(self._seen.get((load, contender), ()))
        if done == 0:
            return load.rate_per_s is None or load.rate_per_s <= SWAMPED * self._peak(contender)
        if done < LEAST_REPEATS:
            return True
        return done < self._most and self._asks(load, contender) and not self._sure(load, contender)

    def measured(self, load: Load, contender: str, requests: int, figures: Mapping[str, float]) -> None:
        """See `Loads`."""
        self._seen.setdefault((load, contender), []).append(figures)
        self._requests[load, contender] = self._requests.get((load, contender), 0) + requests

    def _closed_loops(self) -> Iterator[Load]:
        at_a_time = 1
        while at_a_time <= MOST_AT_A_TIME:
            yield (load := Load("Concurrency", concurrency=at_a_time))
            if not any(self._climbs(load, contender) for contender in self._contenders):
                return
            at_a_time *= 2

    def _rates(self, contender: str) -> Iterator[Load]:
        peak = self._peak(contender)
        if self._held(Load("Concurrency", concurrency=1), contender) == (False, True):
            return
        while peak > 0:
            low, high = bracket(self._answers(contender))
            if high is None:
                high = peak  # no rate above the largest throughput can be kept up
            if low is None:
                rate = min(high, peak) / 2
                if rate < max(_LEAST_SHARE * peak, _LEAST_REQUESTS / self._seconds):
                    return
            elif high / low <= RESOLUTION:
                return
            else:
                rate = math.sqrt(low * high)
            load = replace(self._at_rates, rate_per_s=float(f"{rate:.3g}"))
            if (load, contender) in self._seen:
                return
            yield load

    def _answers(self, contender: str) -> dict[float, tuple[bool, bool]]:
        """Of each rate, whether it holds for a contender, and whether that is sure."""
        return {
            load.rate_per_s: self._held(load, name)
            for load, name in self._seen
            if name == contender and load.rate_per_s
        }

    def _asks(self, load: Load, contender: str) -> bool:
        """Whether this load can tell something of the contender's limit that its other rates do not."""
        if load.rate_per_s is None:
            return True
        others = {rate: held for rate, held in self._answers(contender).items() if rate != load.rate_per_s}
        low, high = bracket(others)
        return (low is None or low < load.rate_per_s) and (high is None or load.rate_per_s < high)

    def _climbs(self, load: Load, contender: str) -> bool:
        """Whether this many at a time bring more than half as many do."""
        if np.mean(self._values(load, contender, "failed_share") or [1.0]) > FAILING:
            return False
        gains = self._gains(load, contender)
        return gains is None or float(np.mean(gains)) > GROWN

    def _gains(self, load: Load, contender: str) -> list[float] | None:
        """The throughput of each repeat over that of half the load on average; None for the first load."""
        half = Load("Concurrency", concurrency=(load.concurrency or 0) // 2)
        before = self._values(half, contender, "requests_per_s")
        if not before or not np.mean(before):
            return None
        return [value / float(np.mean(before)) for value in self._values(load, contender, "requests_per_s")]

    def _sure(self, load: Load, contender: str) -> bool:
        if load.rate_per_s is not None:
            return self._held(load, contender)[1]
        gains = self._gains(load, contender)
        return gains is None or settled(gains, GROWN) is not None

    def _held(self, load: Load, contender: str) -> tuple[bool, bool]:
        shares = self._values(load, contender, "slo_share")
        return held(shares, self._requests[load, contender], self._slo.share)

    def _peak(self, contender: str) -> float:
        closed = {load for load, name in self._seen if name == contender and load.concurrency}
        means = [float(np.mean(self._values(load, contender, "requests_per_s"))) for load in closed]
        return max(means, default=0.0)

    def _values(self, load: Load, contender: str, figure: str) -> list[float]:
        return [figures[figure] for figures in self._seen.get((load, contender), ())]

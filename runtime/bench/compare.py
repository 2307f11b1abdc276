"""Two runs side by side: what differs, how surely, and whether that is a regression.

Measurements of one contender under one load are compared figure by figure. The 95 % confidence interval of a difference
is Welch's, over the repeats. A figure **regressed** if it is worse by more than the threshold and the interval does not
contain zero. If a run has a single repeat there is no interval, and the threshold alone decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stageline.models.errors import StoreError
from stageline.runtime.bench.confidence import difference
from stageline.runtime.bench.records import Figure, Measurement, Run

JUDGED = ("requests_per_s", "tokens_per_s", "goodput_per_s", "latency_p50_s", "latency_p99_s", "ttft_p50_s",
          "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")  # fmt: skip
"""The figures that can regress (default)."""


@dataclass(frozen=True)
class FigureChange:
    """One figure in both runs. `change` is (after - before) / before; `low` and `high` bound it, if known."""

    contender: str
    load: str
    figure: str
    before: Figure
    after: Figure
    change: float
    low: float | None
    high: float | None
    threshold: float

    @property
    def sure(self) -> bool | None:
        """Whether the interval excludes zero; None if there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """`regressed`, `improved`, or `same` (within the threshold, or not sure)."""
        if abs(self.change) <= self.threshold or self.sure is False or self.before.better is None:
            return "same"
        better = (self.change > 0) == (self.before.better == "higher")
        return "improved" if better else "regressed"


def compare(before: Run, after: Run, threshold: float, names: Sequence[str] = JUDGED) -> list[FigureChange]:
    """Changes of the named figures in all measurements that both runs have. StoreError if they share none."""
    others = {_key(measurement): measurement for measurement in after.measurements}
    pairs = [(one, others[_key(one)]) for one in before.measurements if _key(one) in others]
    if not pairs:
        raise StoreError(
            f"runs {before.id} and {after.id} share no contender under the same load: "
            f"{_loads(before)}, and {_loads(after)}; measure both with the same options"
        )
    return [
        _change(one, other, name, threshold)
        for one, other in pairs
        for name in names
        if name in one.figures and name in other.figures and one.figures[name].mean
    ]


def _key(measurement: Measurement) -> tuple[str, str]:
    return measurement.contender, str(measurement.load)


def _change(one: Measurement, other: Measurement, name: str, threshold: float) -> FigureChange:
    before, after = one.figures[name], other.figures[name]
    bounds = difference(before.values, after.values)
    low, high = (bound / abs(before.mean) for bound in bounds) if bounds else (None, None)
    change = (after.mean - before.mean) / abs(before.mean)
    return FigureChange(one.contender, str(one.load), name, before, after, change, low, high, threshold)


def _loads(run: Run) -> str:
    return ", ".join(sorted({f"{m.contender} {m.load}" for m in run.measurements})) or "nothing"

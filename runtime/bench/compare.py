"""Two runs side by side: whether they can be compared, how many times each figure is, and how surely.

Measurements of one contender under one load are compared figure by figure, by the ratio of after to before and its 95 %
confidence interval over the repeats (`Ratio`). A figure is

    same       if the whole interval lies within the margin: between 1 / (1 + margin) and 1 + margin; or if both are one
               measurement, with the same values
    better,    if the interval leaves out 1, the ratio itself lies beyond the margin, and so many figures do not differ
    worse      by chance (`together`)
    undecided  otherwise, and wherever the sample is too small to say anything

The pipeline's figures are one family for `together`, those of all baselines another: of two runs between which a family
did not change, any of its figures is called better or worse 1 time in 20, whatever became of the other family. (In one
family, a pipeline that is surely slower would let a baseline be called worse by chance, and the other way round.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stageline.models.errors import RequestError
from stageline.runtime import words
from stageline.runtime.bench.confidence import CONFIDENCE, Ratio, chance, requests_needed, together
from stageline.runtime.bench.records import CUT, OURS, UNANSWERED, Figure, Measurement, Run, RunLine

Verdict = Literal["better", "worse", "same", "undecided"]
MARGIN = 0.05
"""Changes within this are no changes (default)."""
JUDGED = ("requests_per_s", "tokens_per_s", "goodput_per_s", "latency_p50_s", "latency_p99_s", "ttft_p50_s",
          "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")  # fmt: skip
"""The figures that are judged (default)."""
FEWEST_REQUESTS = 10
"""A verdict needs so many requests on each side: among fewer, a single one is more than a tenth of the sample."""


@dataclass(frozen=True)
class FigureChange:
    """One figure in both runs. `ratio` is after over before; None if a value is zero. `chance`: how often alike figures
    would differ so much, given how many are compared. `doubt`: why the sample cannot carry a verdict, if so.
    `lacking`: why it does not even carry the figure."""

    contender: str
    load: str
    figure: str
    before: Figure
    after: Figure
    ratio: Ratio | None
    margin: float
    chance: float | None = None
    doubt: str | None = None
    lacking: str | None = None

    @property
    def verdict(self) -> Verdict:
        """See the module."""
        if self.doubt is not None or self.chance is None:
            return "undecided"
        if self.before.values == self.after.values:
            return "same"  # the same measurement
        most = 1 + self.margin
        if self.ratio is None:  # shares and goodput may be zero: of those, any sure change counts
            beyond, more = True, self.after.mean > self.before.mean
        else:
            if 1 / most <= (self.ratio.low or 0.0) and (self.ratio.high or math.inf) <= most:
                return "same"
            beyond, more = not 1 / most <= self.ratio.value <= most, self.ratio.value > 1
        if not beyond or self.chance > 1 - CONFIDENCE or self.before.better is None:
            return "undecided"
        return "better" if more == (self.before.better == "higher") else "worse"


def compare(before: Run, after: Run, margin: float = MARGIN, names: Sequence[str] = JUDGED) -> list[FigureChange]:
    """Changes of the named figures in all measurements that both runs have. RequestError with the reason if the runs
    cannot be compared."""
    reason = incomparable(before, after)
    if reason is not None:
        raise RequestError(f"runs {before.id} and {after.id} cannot be compared: {reason}")
    others = {key_of(measurement): measurement for measurement in after.measurements}
    found = [
        change_of(one, others[key_of(one)], name, margin)
        for one in before.measurements
        if key_of(one) in others
        for name in names
        if name in one.figures and name in others[key_of(one)].figures
        if name != "goodput_per_s" or before.settings.slo == after.settings.slo
    ]
    raised: dict[int, float] = {}
    judged = [one for one in found if one.doubt is None and one.chance is not None]
    for family in (
        [one for one in judged if one.contender == OURS],
        [one for one in judged if one.contender != OURS],
    ):
        raised |= zip(map(id, family), together([one.chance or 0.0 for one in family]), strict=True)
    return [replace(change, chance=raised.get(id(change), change.chance)) for change in found]


def overall(changes: Sequence[FigureChange], contender: str = OURS) -> Verdict:
    """One verdict on a contender: worse if any figure is; else better if any is; the same if all figures whose sample
    is large enough are; else undecided."""
    found = [change.verdict for change in changes if change.contender == contender and change.doubt is None]
    decided: tuple[Verdict, Verdict] = ("worse", "better")
    for verdict in decided:
        if verdict in found:
            return verdict
    return "same" if set(found) == {"same"} else "undecided"


def incomparable(before: Run, after: Run) -> str | None:
    """Why a comparison of two runs would say nothing about a change: other models, other requests, or no load in
    common; None if it would."""
    if not same_model(before, after):
        return f"they measured different models, {_model(before)} and {_model(after)}"
    old, new = before.settings, after.settings
    for what, one, other in (
        ("requests", old.inputs, new.inputs),
        ("texts per request", old.rows, new.rows),
        ("new tokens per request", old.output_tokens, new.output_tokens),
    ):
        if one != other:
            return f"they had different loads ({what}: {one}, and {other}); measure both with the same options"
    if not {key_of(one) for one in before.measurements} & {key_of(one) for one in after.measurements}:
        return (
            f"no contender has the same load in both ({_loads(before)}; and {_loads(after)}); "
            "measure both with the same options"
        )
    return None


def same_model(before: Run | RunLine, after: Run | RunLine) -> bool:
    """Whether two runs measured the same weights, however these are cut. Runs of before `checkpoint` was recorded are
    told apart by their bundles, and by the kind and number of blocks."""
    if before.checkpoint and after.checkpoint:
        return before.checkpoint == after.checkpoint
    if before.bundle == after.bundle:
        return True
    if isinstance(before, RunLine) or isinstance(after, RunLine):
        return False
    known = [(run.model, run.task, run.dtype, sum(run.plan.blocks)) for run in (before, after)]
    return before.bundle_digest == after.bundle_digest or known[0] == known[1]


def change_of(before: Measurement, after: Measurement, name: str, margin: float = MARGIN) -> FigureChange:
    """How a figure that both have changed."""
    old, new = before.figures[name], after.figures[name]
    ratio = Ratio.between(old.values, new.values)
    likely = ratio.chance if ratio else chance(old.values, new.values)
    lacking = missing(before, name) or missing(after, name)
    doubt = _doubt(before, after, name) or lacking
    return FigureChange(before.contender, str(before.load), name, old, new, ratio, margin, likely, doubt, lacking)


def _doubt(before: Measurement, after: Measurement, name: str) -> str | None:
    fewest = min(before.requests, after.requests)
    if fewest < FEWEST_REQUESTS:
        return f"{words.counted(fewest, 'request')}; a verdict needs {FEWEST_REQUESTS}"
    if min(len(before.figures[name].values), len(after.figures[name].values)) < 2:
        return "one repeat has no interval"
    return None


def sample(measurement: Measurement) -> int:
    """The answered requests of a repeat, on average, rounded down."""
    repeats = max((len(figure.values) for figure in measurement.figures.values()), default=1)
    failed = measurement.figures.get("failed_share")
    answered = measurement.requests * (1 - (failed.mean if failed else 0.0))
    return math.floor(answered / repeats + 1e-6)


def missing(measurement: Measurement, name: str) -> str | None:
    """Why this figure's sample does not carry it, for example "p99 needs 100 requests in each repeat, not 6", or "p99
    is not known: 9 of 60 requests had no answer in time"; None if it does."""
    needed, had = requests_needed(name), sample(measurement)
    percentile = name.rsplit("_", 2)[-2] if name.endswith("_s") else name
    late = sum(one.count for one in measurement.failures if one.kind in (UNANSWERED, CUT))
    if name not in measurement.figures and late and name.startswith(("latency_", "ttft_")):
        asked = words.counted(measurement.requests, "request")
        return f"{percentile} is not known: {late} of {asked} had no answer in time"
    return None if had >= needed else f"{percentile} needs {needed} requests in each repeat, not {had}"


def carried(measurement: Measurement) -> Measurement:
    """The measurement without the figures that its sample does not carry."""
    kept = {name: figure for name, figure in measurement.figures.items() if missing(measurement, name) is None}
    return replace(measurement, figures=kept)


def key_of(measurement: Measurement) -> tuple[str, str]:
    """Contender and load: what must agree for two measurements to be compared."""
    return measurement.contender, str(measurement.load)


def _model(run: Run) -> str:
    return f"{Path(run.bundle).name} ({run.model}, {words.counted(sum(run.plan.blocks), 'block')}, {run.dtype})"


def _loads(run: Run) -> str:
    return ", ".join(sorted({f"{m.contender} {m.load}" for m in run.measurements})) or "nothing"

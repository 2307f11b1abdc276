"""What one run says: whether it is good, against which baseline, what holds it back, and what to do next.

Every statement names the load that it is about. The report's test recomputes them from the raw requests.
"""

import math
from dataclasses import dataclass

from stageline.runtime import words
from stageline.runtime.bench.confidence import Ratio
from stageline.runtime.bench.records import OURS, Measurement, Run
from stageline.runtime.report import wording


@dataclass(frozen=True)
class Against:
    """Our throughput over a baseline's, under one load."""

    contender: str
    load: str
    ratio: Ratio

    @property
    def text(self) -> str:
        """Stageline is 0.51 times onnxruntime, 1 at a time (95 %: 0.45 to 0.58)."""
        value, interval = words.figure(self.ratio.value), wording.between(self.ratio)
        return f"Stageline is {value} times {self.contender}, {self.load} ({interval})."


def throughput_name(run: Run) -> str:
    """The figure that states a run's throughput: tokens/s if its model generates, else requests/s."""
    return "tokens_per_s" if run.settings.output_tokens is not None else "requests_per_s"


def throughput_unit(run: Run) -> str:
    """Of that figure."""
    return wording.label(throughput_name(run))


def of_load(run: Run, load: str) -> list[Measurement]:
    """All contenders under one load."""
    return [one for one in run.measurements if str(one.load) == load]


def mean(measurement: Measurement, name: str) -> float | None:
    """The mean of a figure; None if it is absent."""
    figure = measurement.figures.get(name)
    return None if figure is None or not math.isfinite(figure.mean) else figure.mean


def against(run: Run, load: str) -> list[Against]:
    """How many times each baseline our throughput is under this load, the best baseline first."""
    name = throughput_name(run)
    measured = {one.contender: one for one in of_load(run, load) if name in one.figures}
    ours = measured.pop(OURS, None)
    if ours is None:
        return []
    ranked = sorted(measured.values(), key=lambda one: -one.figures[name].mean)
    pairs = [(one, Ratio.between(one.figures[name].values, ours.figures[name].values)) for one in ranked]
    return [Against(one.contender, load, ratio) for one, ratio in pairs if ratio is not None]

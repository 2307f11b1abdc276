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
    return "tokens_per_s" if generates(run) else "requests_per_s"


def generates(run: Run) -> bool:
    """Whether the requests of a run draw tokens."""
    return run.settings.output_tokens is not None


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


WITHIN = 0.9
"""A load keeps the SLO if at least this share of its requests, failed ones included, kept every bound."""
_FULL, _UNEVEN, _FULL_MEMORY = 0.7, 1.15, 0.9


@dataclass(frozen=True)
class Bottleneck:
    """What holds a load back. `what`: stage, link, host, memory or load (too little of it)."""

    what: str
    text: str
    step: str


@dataclass(frozen=True)
class Answer:
    """Whether a run is good: our most throughput that keeps the SLO, against the best baseline under the same load.

    `kept`: whether that load keeps the run's SLO; None if it has none. `bottleneck`: None if the stages were not
    observed.
    """

    best: Measurement
    throughput: str
    kept: bool | None
    against: Against | None
    bottleneck: Bottleneck | None
    step: str

    @property
    def text(self) -> str:
        """The first line of a page or report."""
        slo = {None: "", True: ", within the SLO", False: ", but no load keeps the SLO"}[self.kept]
        parts = [f"{self.throughput}, {self.best.load}{slo}."]
        parts.append(self.against.text if self.against else "No baseline was measured at this load.")
        if self.bottleneck:
            parts.append(f"Bottleneck: {self.bottleneck.text}.")
        return " ".join([*parts, f"Next: {self.step}"])


def slo_share(measurement: Measurement) -> float | None:
    """The share of all requests that kept every bound; None without bounds."""
    goodput, answered = mean(measurement, "goodput_per_s"), mean(measurement, "requests_per_s")
    if goodput is None or not answered:
        return None if goodput is None else 0.0
    return goodput / answered * (1 - (mean(measurement, "failed_share") or 0.0))


def answer(run: Run) -> Answer | None:
    """Whether the run is good; None if our pipeline has no throughput in it."""
    name = throughput_name(run)
    ours = [one for one in run.measurements if one.contender == OURS and mean(one, name) is not None]
    if not ours:
        return None
    shares = {id(one): slo_share(one) for one in ours}
    keeping = [one for one in ours if (shares[id(one)] or 0.0) >= WITHIN]
    best = max(keeping or ours, key=lambda one: mean(one, name) or 0.0)
    kept = None if shares[id(best)] is None else bool(keeping)
    peers = against(run, str(best.load))
    held = bottleneck(run, best)
    return Answer(
        best, wording.with_doubt(best.figures[name]), kept, peers[0] if peers else None, held,
        _next_step(run, ours, best, held, peers),
    )  # fmt: skip


def bottleneck(run: Run, measurement: Measurement) -> Bottleneck | None:
    """The most occupied of stages and links, if any is occupied for most of the time; else the memory, the load or the
    host, by exclusion. None if the stages were not observed."""
    if not measurement.stages:
        return None
    memory = mean(measurement, "host_memory_bytes")
    if memory is not None and memory > _FULL_MEMORY * run.environment.memory_bytes:
        used, whole = words.size(memory), words.size(run.environment.memory_bytes)
        return Bottleneck("memory", f"memory, {used} of {whole} in use", "quantise the weights: --quantise int8.")
    wholes = [(one.busy_s + one.copy_s + one.idle_s) or 1.0 for one in measurement.stages]
    busy = [one.busy_s / whole for one, whole in zip(measurement.stages, wholes, strict=True)]
    copying = [one.copy_s / whole for one, whole in zip(measurement.stages, wholes, strict=True)]
    stage, link = busy.index(max(busy)), copying.index(max(copying))
    if copying[link] > max(0.2, busy[stage]):
        return Bottleneck("link", f"the link into stage {link}, copying {copying[link]:.0%} of the time",
                          f"fewer stages, or another cut: stageline plan {run.bundle}")  # fmt: skip
    if busy[stage] >= _FULL:
        uneven = len(busy) > 1 and busy[stage] > _UNEVEN * sum(busy) / len(busy)
        step = f"move blocks off stage {stage}: stageline plan {run.bundle}" if uneven else (
            "the stages are even; fewer bits make them faster: --quantise int8.")  # fmt: skip
        return Bottleneck("stage", f"stage {stage}, busy {busy[stage]:.0%} of the time", step)
    if (mean(measurement, "in_flight") or math.inf) < len(busy) + 0.5 and len(busy) > 1:
        at_a_time = words.counted(measurement.load.concurrency or 1, "request")
        return Bottleneck("load", f"the load, {at_a_time} at a time for {len(busy)} stages",
                          f"measure with more at a time: --concurrency {4 * len(busy)}")  # fmt: skip
    return Bottleneck("host", f"the host, for no stage is busy for more than {busy[stage]:.0%} of the time",
                      f"see what the stages wait for: stageline bench {run.bundle} --timeline out.json")  # fmt: skip


def _next_step(
    run: Run, ours: list[Measurement], best: Measurement, held: Bottleneck | None, peers: list[Against]
) -> str:
    """One thing to do: first make the measurement sure, then what the bottleneck asks for."""
    spread = best.figures[throughput_name(run)].spread
    if spread is None or spread > 0.25:
        return f"measure longer, this is not sure: --seconds {2 * run.settings.seconds:g} --repeats 5"
    if not peers:
        return "measure a baseline beside it: --baseline onnxruntime"
    ahead = peers[0].ratio.high is not None and peers[0].ratio.high < 1
    if ahead and len(run.plan.blocks) > 1 and len(set(run.plan.devices)) > 1 and run.environment.gpu is None:
        return f"one stage on all cores may be faster: stageline recut {run.bundle} --stages 1"
    return held.step if held else "look at its timeline."

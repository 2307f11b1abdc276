"""What one run says: whether it is good, against which baseline, what holds it back, and what to do next.

Every statement names the load that it is about. The report's test recomputes them from the raw requests.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stageline.runtime import words
from stageline.runtime.bench.capacity import capacities
from stageline.runtime.bench.confidence import Ratio
from stageline.runtime.bench.records import OURS, Measurement, Run
from stageline.runtime.report import wording


@dataclass(frozen=True)
class Against:
    """Ours over a baseline's, under one load: throughput, or median latency where the load sets the rate."""

    contender: str
    load: str
    figure: str
    ratio: Ratio

    @property
    def text(self) -> str:
        """Stageline is 0.51 times onnxruntime, 1 at a time (95 %: 0.45 to 0.58). Or: has 1.90 times the latency of."""
        value, interval = words.figure(self.ratio.value), wording.between(self.ratio)
        times = "has {} times the latency of" if self.figure == _LATENCY else "is {} times"
        return f"Stageline {times.format(value)} {self.contender}, {self.load} ({interval})."


_LATENCY = "latency_p50_s"


def compared_figure(run: Run, load: str) -> str:
    """What contenders are compared by under this load: throughput; at a given rate, which all that keep up answer,
    median latency."""
    open_loop = any(one.load.rate_per_s is not None for one in of_load(run, load))
    return _LATENCY if open_loop else throughput_name(run)


def throughput_name(run: Run) -> str:
    """The figure that states a run's throughput: tokens/s if its model generates, else requests/s."""
    return "tokens_per_s" if generates(run) else "requests_per_s"


def generates(run: Run) -> bool:
    """Whether the requests of a run draw tokens."""
    return run.settings.output_tokens is not None


def throughput_unit(run: Run) -> str:
    """Of that figure."""
    return wording.label(throughput_name(run))


def loads(run: Run, contender: str | None = None) -> list[str]:
    """The loads of a run (of one contender), those of a kind from the smallest to the largest."""
    found = {str(one.load): one.load for one in run.measurements if contender in (None, one.contender)}
    kinds = list(dict.fromkeys(load.scenario for load in found.values()))
    return sorted(
        found,
        key=lambda name: (kinds.index(found[name].scenario), found[name].concurrency or found[name].rate_per_s or 0),
    )


def of_load(run: Run, load: str) -> list[Measurement]:
    """All contenders under one load."""
    return [one for one in run.measurements if str(one.load) == load]


def mean(measurement: Measurement, name: str) -> float | None:
    """The mean of a figure; None if it is absent."""
    figure = measurement.figures.get(name)
    return None if figure is None or not math.isfinite(figure.mean) else figure.mean


def against(run: Run, load: str) -> list[Against]:
    """How many times each baseline we are under this load, the best baseline first."""
    name = compared_figure(run, load)
    measured = {one.contender: one for one in of_load(run, load) if name in one.figures}
    ours = measured.pop(OURS, None)
    if ours is None:
        return []
    pairs = [
        (one, Ratio.between(one.figures[name].values, ours.figures[name].values))
        for one in best_first(measured.values(), name)
    ]
    return [Against(one.contender, load, name, ratio) for one, ratio in pairs if ratio is not None]


def best_first(measurements: Iterable[Measurement], name: str) -> list[Measurement]:
    """Measurements that have this figure, by its mean."""

    def rank(one: Measurement) -> float:
        figure = one.figures[name]
        return figure.mean if figure.better == "lower" else -figure.mean

    return sorted(measurements, key=rank)


_FULL = 0.7
"""A stage that is busy for this share of the time holds the rest up; no schedule keeps one busy all the time."""
_UNEVEN = 1.15
"""A stage that is busy for so many times the mean is worth moving blocks off it."""
_MUCH_COPYING, _FULL_MEMORY, _UNSURE = 0.2, 0.9, 0.25
_INT8 = "--quantise int8"


@dataclass(frozen=True)
class Bottleneck:
    """What holds a load back. `what`: stage, link, host, memory or load (too little of it). `step` and `command`: what
    to do about it."""

    what: str
    text: str
    step: str
    command: str


@dataclass(frozen=True)
class Answer:
    """Whether a run is good: our most throughput that keeps the SLO, against the best baseline under the same load.

    `kept`: whether that load keeps the run's SLO; None if it has none. `against`: None if there is nothing to compare;
    `behind` are the baselines under that load then, if any. `bottleneck`: None if the stages were not observed.
    """

    best: Measurement
    throughput: str
    kept: bool | None
    against: Against | None
    behind: tuple[str, ...]
    bottleneck: Bottleneck | None
    step: str
    command: str

    @property
    def achieved(self) -> str:
        """46.5 tokens/s ±3 % within the SLO, 4 at a time."""
        slo = {None: "", True: " within the SLO", False: ""}[self.kept]
        return f"{self.throughput}{slo}, {self.best.load}{'; no load keeps the SLO' if self.kept is False else ''}."

    @property
    def rest(self) -> str:
        """The best baseline at the same load, the bottleneck, and the next step without its command."""
        none = "No baseline was measured at this load."
        if self.behind:
            none = f"No comparison with {', '.join(self.behind)} at this load: too few requests were answered in time."
        parts = [self.against.text if self.against else none]
        if self.bottleneck:
            parts.append(f"Bottleneck: {self.bottleneck.text}.")
        return " ".join([*parts, f"Next: {self.step}:"])


def slo_share(measurement: Measurement) -> float | None:
    """The share of all requests, failed ones included, that kept every bound; None without bounds. Runs of before it
    was kept have it from goodput."""
    share = mean(measurement, "slo_share")
    goodput, answered = mean(measurement, "goodput_per_s"), mean(measurement, "requests_per_s")
    if share is not None or goodput is None:
        return share
    return goodput / answered * (1 - (mean(measurement, "failed_share") or 0.0)) if answered else 0.0


def answer(run: Run) -> Answer | None:
    """Whether the run is good; None if our pipeline has no throughput in it."""
    name = throughput_name(run)
    ours = [one for one in run.measurements if one.contender == OURS and mean(one, name) is not None]
    if not ours:
        return None
    shares = {id(one): slo_share(one) for one in ours}
    keeping = [one for one in ours if (shares[id(one)] or 0.0) >= run.settings.slo.share]
    best = max(keeping or ours, key=lambda one: mean(one, name) or 0.0)
    kept = None if shares[id(best)] is None else bool(keeping)
    peers = against(run, str(best.load))
    others = () if peers else tuple(one.contender for one in of_load(run, str(best.load)) if one.contender != OURS)
    held = bottleneck(run, best)
    step, command = _next_step(run, best, held, peers, others)
    throughput = wording.with_doubt(best.figures[name])
    return Answer(best, throughput, kept, peers[0] if peers else None, others, held, step, command)


def capacity_lines(run: Run) -> list[str]:
    """The knee of each contender, and the largest rate that keeps the SLO, as far as the run has the loads."""
    found = []
    for one in capacities(run.measurements, run.settings.slo):
        if one.knee is not None:
            beyond = ", the largest that was measured: the knee may lie beyond" if one.climbing else ""
            found.append(f"The knee of {one.contender} is at {one.knee}{beyond}.")
        if one.best is not None:
            sure = "" if one.sure else ", not surely"
            over = "no larger rate failed"
            if one.over_per_s is not None:
                over = f"{words.figure(one.over_per_s)}/s does not"
            found.append(f"The largest rate at which {one.contender} keeps the SLO{sure}: {one.best}; {over}.")
        elif one.over_alone:
            found.append(f"{one.contender} does not keep the SLO, not even with one request at a time.")
        elif one.over_per_s is not None:
            sure = "" if one.sure else ", not surely"
            least = words.figure(one.over_per_s)
            found.append(f"{one.contender} keeps the SLO at no rate measured, down to {least}/s{sure}.")
    return found


def bottleneck(run: Run, measurement: Measurement) -> Bottleneck | None:
    """The most occupied of stages and links, if any is occupied for most of the time; else the memory, the load or the
    host, by exclusion. None if the stages were not observed."""
    if not measurement.stages:
        return None
    plan = f"stageline plan {_typed(run.bundle)}"
    memory = mean(measurement, "host_memory_bytes")
    if memory is not None and memory > _FULL_MEMORY * run.environment.memory_bytes:
        used, whole = words.size(memory), words.size(run.environment.memory_bytes)
        return Bottleneck("memory", f"memory, {used} of {whole} in use", "quantise the weights", _bench(run, _INT8))
    wholes = [(one.busy_s + one.copy_s + one.idle_s) or 1.0 for one in measurement.stages]
    busy = [one.busy_s / whole for one, whole in zip(measurement.stages, wholes, strict=True)]
    copying = [one.copy_s / whole for one, whole in zip(measurement.stages, wholes, strict=True)]
    stage, link = busy.index(max(busy)), copying.index(max(copying))
    if copying[link] > max(_MUCH_COPYING, busy[stage]):
        text = f"the link into stage {link}, copying {wording.percent(copying[link])} of the time"
        return Bottleneck("link", text, "plan fewer stages or another cut", plan)
    if busy[stage] >= _FULL:
        text = f"stage {stage}, busy {wording.percent(busy[stage])} of the time"
        if len(busy) > 1 and busy[stage] > _UNEVEN * sum(busy) / len(busy):
            return Bottleneck("stage", text, f"move blocks off stage {stage}", plan)
        return Bottleneck("stage", text, "the stages are even, make them faster with fewer bits", _bench(run, _INT8))
    if len(busy) > 1 and (mean(measurement, "in_flight") or math.inf) < len(busy) + 0.5:
        text = f"the load, {measurement.load} for {len(busy)} stages"
        more = _bench(run, f"--concurrency {4 * len(busy)}")
        return Bottleneck("load", text, "measure with more at a time", more)
    text = f"the host, for no stage is busy for more than {wording.percent(busy[stage])} of the time"
    return Bottleneck("host", text, "see what the stages wait for", _bench(run, "--timeline out.json"))


def _next_step(
    run: Run, best: Measurement, held: Bottleneck | None, peers: Sequence[Against], behind: Sequence[str]
) -> tuple[str, str]:
    """One thing to do and its command: first make the measurement sure, then what the bottleneck asks for."""
    spread = best.figures[throughput_name(run)].spread
    if spread is None or spread > _UNSURE:
        return "measure longer, for this is not sure", _bench(
            run, f"--seconds {2 * run.settings.seconds:g} --repeats 5"
        )
    if not peers and not behind:
        return "measure a baseline beside it", _bench(run, "--baseline onnxruntime")
    if peers and _ahead(peers[0]) and len(run.plan.blocks) > 1 and run.environment.gpu is None:
        return "one stage on all cores may be faster", f"stageline recut {_typed(run.bundle)} --stages 1"
    if held is None:
        return "look at its timeline", "stageline dashboard"
    return held.step, held.command


def _ahead(peer: Against) -> bool:
    """Whether a baseline is surely better than we are."""
    if peer.figure == _LATENCY:
        return (peer.ratio.low or 0) > 1
    return (peer.ratio.high or math.inf) < 1


def _bench(run: Run, options: str) -> str:
    return f"stageline bench {_typed(run.bundle)} {options}"


def _typed(bundle: str) -> str:
    """A bundle's folder as one would type it here: relative if it lies below the current folder, and quoted."""
    place, here = Path(bundle), Path.cwd()
    return shlex.quote(str(place.relative_to(here)) if place.is_relative_to(here) else bundle)

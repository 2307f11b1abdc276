"""Data of the Overview and Compare pages: headlines, curves, baselines, changes with confidence."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stageline.runtime import words
from stageline.runtime.bench.compare import FigureChange, change_of, compare, same_model
from stageline.runtime.bench.records import LADDER, OURS, Figure, Measurement, Run, RunLine, Slo
from stageline.runtime.report import wording
from stageline.runtime.report.wording import KEY_FIGURES

SWEEPS = ("Concurrency", "Rate")
figure_label, figure_text = wording.label, wording.value
PERCENTILES = ("p50", "p90", "p95", "p99")


def by_bundle(lines: Iterable[RunLine]) -> dict[str, list[RunLine]]:
    """Runs by bundle folder, newest first; the bundle with the newest run first."""
    found: dict[str, list[RunLine]] = {}
    for line in lines:
        found.setdefault(line.bundle, []).append(line)
    return found


def earlier(lines: Iterable[RunLine], line: RunLine) -> RunLine | None:
    """The newest earlier complete run of the same model that shares a load with this one."""
    mine = {(one.contender, one.load) for one in line.headlines}
    return next(
        (
            one
            for one in lines
            if same_model(one, line)
            and one.created < line.created
            and one.status == "done"
            and mine & {(headline.contender, headline.load) for headline in one.headlines}
        ),
        None,
    )


def short(bundle: str) -> str:
    """The last part of a bundle's path."""
    return Path(bundle).name or bundle


def tag(run_id: str) -> str:
    """The last part of an id, which distinguishes runs on a page."""
    return run_id.rpartition("-")[2][-8:]


def label(line: RunLine | Run, now_s: float) -> str:
    """The text of a run in a list to choose from."""
    named = f" {line.name}" if line.name and line.name != short(line.bundle) else ""
    return f"{short(line.bundle)}{named}, {words.ago(line.created, now_s)}, {tag(line.id)}"


def generates(run: Run) -> bool:
    """Whether the requests of a run draw tokens."""
    return run.settings.output_tokens is not None


def throughput_name(run: Run) -> str:
    """The name of the figure that states a run's throughput."""
    return "tokens_per_s" if generates(run) else "samples_per_s"


def ours(run: Run) -> list[Measurement]:
    """The measurements of the bundle's own pipeline."""
    return [one for one in run.measurements if one.contender == OURS]


def mean(measurement: Measurement, name: str) -> float | None:
    """The mean of a figure; None if it is absent."""
    figure = measurement.figures.get(name)
    return None if figure is None or not math.isfinite(figure.mean) else figure.mean


def fullest(run: Run, contender: str = OURS) -> Measurement | None:
    """The measurement of a contender with the highest throughput."""
    name = throughput_name(run)
    known = [one for one in run.measurements if one.contender == contender and mean(one, name) is not None]
    return max(known, key=lambda one: mean(one, name) or 0.0, default=None)


def calmest(run: Run) -> Measurement | None:
    """Our measurement with the lowest median latency, with one request at a time if that was measured."""
    alone = [one for one in ours(run) if one.load.scenario == "SingleStream" or one.load.concurrency == 1]
    known = [one for one in alone or ours(run) if mean(one, "latency_p50_s") is not None]
    return min(known, key=lambda one: mean(one, "latency_p50_s") or math.inf, default=None)


@dataclass(frozen=True)
class Card:
    """A headline number as text; its change since the run before, and whether that is sure (its 95 % interval excludes
    zero); which direction is better; the load."""

    label: str
    value: str
    change: str | None
    sure: bool
    better: str | None
    about: str


def cards(run: Run, before: Run | None) -> list[Card]:
    """The headline numbers: throughput first, then latency, then use of time, memory and energy."""
    full, calm = fullest(run), calmest(run)
    unit = "tokens" if generates(run) else "texts"
    wanted: list[tuple[str, Measurement | None, str, Callable[[float], str]]] = [
        ("Throughput", full, throughput_name(run), lambda v: words.rate(v, unit)),
        ("Latency p50", calm, "latency_p50_s", words.seconds),
        ("Latency p99", calm, "latency_p99_s", words.seconds),
        ("TTFT p50", calm, "ttft_p50_s", words.seconds),
        ("TPOT p50", calm, "tpot_p50_s", words.seconds),
        ("Bubble ratio", full, "bubble_ratio", words.share),
        ("Memory", full, "host_memory_bytes", words.size),
        ("Energy", full, "energy_per_token_j", lambda v: f"{words.figure(v * 1e3)} mJ/token"),
    ]
    found = []
    for name, measurement, figure_name, text in wanted:
        figure = measurement.figures.get(figure_name) if measurement else None
        if measurement is None or figure is None or not math.isfinite(figure.mean):
            continue
        same = _same(before, measurement)
        old = same.figures.get(figure_name) if same else None
        change = words.change(figure.mean / old.mean - 1) if old and old.mean else None
        sure = same is not None and old is not None and change_of(same, measurement, figure_name).verdict in (
            "better", "worse")  # fmt: skip
        about = f"{measurement.load}, {words.counted(len(figure.values), 'repeat')}{_spread(figure, text)}"
        found.append(Card(name, text(figure.mean), change, sure, figure.better, about))
    return found


def _spread(figure: Figure, text: Callable[[float], str]) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"; 95 % confidence: {text(max(0.0, figure.low))} to {text(figure.high)}"


def _same(run: Run | None, measurement: Measurement) -> Measurement | None:
    """The measurement in `run` of the same contender under the same load."""
    key = (measurement.contender, str(measurement.load))
    return next((one for one in run.measurements if (one.contender, str(one.load)) == key), None) if run else None


def curve_rows(run: Run, percentile: str) -> list[dict[str, Any]]:
    """Throughput and latency of each contender under each load; points with the same `sweep` are joined."""
    name = throughput_name(run)
    rows = []
    for one in run.measurements:
        x, y = mean(one, name), mean(one, f"latency_{percentile}_s")
        if x is None or y is None:
            continue
        at = one.load.concurrency or one.load.rate_per_s or 0.0
        rows.append(
            {
                "contender": one.contender,
                "load": str(one.load),
                "throughput": x,
                "latency_ms": y * 1e3,
                "order": at,
                "sweep": one.load.scenario if one.load.scenario in SWEEPS else None,
            }
        )
    return rows


def baseline_rows(run: Run) -> list[dict[str, Any]]:
    """Each contender's throughput under the load where it is highest and that we share. `ratio`: ours over it; None for
    ours."""
    name, own = throughput_name(run), {str(one.load): one for one in ours(run)}
    rows = []
    for contender in dict.fromkeys(one.contender for one in run.measurements):
        shared = [
            (mean(one, name), one)
            for one in run.measurements
            if one.contender == contender and str(one.load) in own and mean(one, name) is not None
        ]
        if not shared:
            continue
        value, best = max(shared, key=lambda pair: pair[0] or 0.0)
        mine = mean(own[str(best.load)], name)
        figure = best.figures[name]
        rows.append(
            {
                "contender": contender,
                "load": str(best.load),
                "throughput": value,
                "low": value if figure.low is None else max(0.0, figure.low),
                "high": value if figure.high is None else figure.high,
                "ratio": None if contender == OURS or not mine or not value else mine / value,
            }
        )
    return rows


def stage_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """How each stage spent its time, in percent."""
    rows = []
    for stage in measurement.stages:
        total = (stage.busy_s + stage.copy_s + stage.idle_s) or 1.0
        for order, (what, seconds) in enumerate(
            (("computing", stage.busy_s), ("copying in", stage.copy_s), ("waiting", stage.idle_s))
        ):
            rows.append(
                {
                    "stage": f"stage {stage.stage}",
                    "device": stage.device,
                    "blocks": stage.blocks,
                    "what": what,
                    "order": order,
                    "percent": 100 * seconds / total,
                    "seconds": seconds,
                }
            )
    return rows


def changes(before: Run, after: Run, key: tuple[str, str], threshold: float) -> list[FigureChange]:
    """Changes of the key figures of one contender under one load, as in `stageline bench compare`."""
    one, other = (replace(run, measurements=(measurement_of(run, key)[1],)) for run in (before, after))
    return compare(one, other, threshold, KEY_FIGURES)


def change_table(found: Sequence[FigureChange]) -> list[dict[str, str]]:
    """Rows of a table: the verdict, how many times the figure is, and how sure that is."""
    return [
        {
            "verdict": one.verdict,
            "figure": figure_label(one.figure),
            "after is": wording.change(one),
            "95 % confidence": wording.certainty(one).removeprefix("95 %: "),
            "before": wording.with_doubt(one.before),
            "after": wording.with_doubt(one.after),
        }
        for one in found
    ]


def differences(before: Run, after: Run) -> list[str]:
    """What differs between two runs apart from figures: plan, settings, machine, versions, commit."""
    found = []
    pairs = [
        ("plan", " + ".join(map(str, before.plan.blocks)), " + ".join(map(str, after.plan.blocks))),
        ("devices", ", ".join(before.plan.devices), ", ".join(after.plan.devices)),
        ("bundle", before.bundle_digest[:12], after.bundle_digest[:12]),
        *(
            (name, *(str(getattr(run.settings.pipeline, name)) for run in (before, after)))
            for name in ("engine", "quantise", "threads", "slots")
        ),
        ("inputs", before.settings.inputs, after.settings.inputs),
        ("baselines", ", ".join(before.settings.baselines) or "none", ", ".join(after.settings.baselines) or "none"),
        ("SLO", _bounds(before.settings.slo), _bounds(after.settings.slo)),
        ("repeats", str(before.settings.repeats), str(after.settings.repeats)),
        ("seconds per repeat", f"{before.settings.seconds:g}", f"{after.settings.seconds:g}"),
        ("machine", before.environment.machine, after.environment.machine),
        ("GPU", str(before.environment.gpu), str(after.environment.gpu)),
        ("commit", str(before.environment.commit)[:12], str(after.environment.commit)[:12]),
    ]
    found += [f"{name}: {old} → {new}" for name, old, new in pairs if old != new]
    versions = before.environment.versions, after.environment.versions
    for package in sorted(set(versions[0]) | set(versions[1])):
        old, new = (version.get(package, "absent") for version in versions)
        if old != new:
            found.append(f"{package}: {old} → {new}")
    return found


def _bounds(slo: Slo) -> str:
    known = {"latency": slo.latency_s, "TTFT": slo.ttft_s, "TPOT": slo.tpot_s}
    return ", ".join(f"{name} {words.seconds(bound)}" for name, bound in known.items() if bound is not None) or "none"


def common_loads(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Contender and load of the measurements that all runs have, ours first."""
    kept = [{(one.contender, str(one.load)) for one in run.measurements} for run in runs]
    first = [(one.contender, str(one.load)) for one in runs[0].measurements] if runs else []
    shared = [key for key in first if all(key in keys for keys in kept)]
    return sorted(shared, key=lambda key: key[0] != OURS)


def measurement_of(run: Run, key: tuple[str, str]) -> tuple[int, Measurement]:
    """The measurement of a contender under a load, with its number in the run."""
    return next((n, one) for n, one in enumerate(run.measurements) if (one.contender, str(one.load)) == key)


def ladder_rows(name: str, measurement: Measurement, what: str) -> list[dict[str, Any]]:
    """A ladder for the chart, as far as at least one request lies beyond. `nines` stretches the slow end: 0 at p0, 1 at
    p90, 2 at p99, 3 at p99.9."""
    return [
        {
            "run": name,
            "percentile": percentile,
            "nines": min(4.0, -math.log10(max(1e-9, 1 - percentile / 100))),
            "ms": value * 1e3,
        }
        for percentile, value in zip(LADDER, measurement.ladders.get(what, ()), strict=False)
        if math.isfinite(value) and (1 - percentile / 100) * measurement.requests >= 1
    ]


def flat_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All figures of runs, one row each, for a download."""
    return [
        {
            "run": run.id,
            "bundle": run.bundle,
            "created": run.created,
            "contender": one.contender,
            "load": str(one.load),
            "figure": name,
            "unit": figure.unit,
            "mean": figure.mean,
            "low_95": figure.low,
            "high_95": figure.high,
            "repeats": len(figure.values),
        }
        for run in runs
        for one in run.measurements
        for name, figure in one.figures.items()
    ]

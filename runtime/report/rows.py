"""What charts draw: the measurements of a run as rows, one per mark. Times are in seconds."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from stageline.runtime import words
from stageline.runtime.bench.compare import missing, sample
from stageline.runtime.bench.confidence import requests_needed
from stageline.runtime.bench.records import LADDER, OURS, Figure, Measurement, Run
from stageline.runtime.report import wording
from stageline.runtime.report.statements import (
    against,
    best_first,
    compared_figure,
    loads,
    mean,
    of_load,
    throughput_name,
)

SWEEPS = ("Concurrency", "Rate")
TIMES = ("latency", "ttft", "tpot")
PERCENTILES = ("p50", "p90", "p95", "p99")


def curve_rows(run: Run, time: str, before: Run | None = None, cuts: Sequence[Run] = ()) -> list[dict[str, Any]]:
    """Throughput and a time ("latency_p99") of each contender under each load, with the 95 % intervals of both; of the
    run before, and of runs of other `cuts` of the model, our own. Loads whose sample does not carry that percentile are
    left out. Points with the same `sweep` are joined."""
    drawn = [(run, "this run", one.contender, one) for one in run.measurements]
    if before is not None:
        drawn += [(before, "run before", OURS, one) for one in before.measurements if one.contender == OURS]
    for cut in cuts:
        name = f"{OURS}, {words.counted(len(cut.plan.blocks), 'stage')}"
        drawn += [(cut, "this run", name, one) for one in cut.measurements if one.contender == OURS]
    name, rows = throughput_name(run), []
    for of, which, contender, one in drawn:
        x, y = one.figures.get(name), one.figures.get(f"{time}_s")
        if x is None or y is None or not math.isfinite(y.mean) or missing(one, f"{time}_s"):
            continue
        least, most = bounds(x)
        low, high = bounds(y)
        rows.append(
            {
                "contender": contender,
                "run": which,
                "id": of.id,
                "load": str(one.load),
                "short": short_load(one),
                "requests": one.requests,
                "throughput": x.mean,
                "least": least,
                "most": most,
                "time_s": y.mean,
                "low_s": low,
                "high_s": high,
                "order": one.load.concurrency or one.load.rate_per_s or 0.0,
                "sweep": f"{which} {contender} {one.load.scenario}" if one.load.scenario in SWEEPS else None,
            }
        )
    return rows


def left_out(run: Run, time: str) -> list[str]:
    """Why the curve of this time lacks some of our loads, a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for one in run.measurements:
        if one.contender == OURS and f"{time}_s" in one.figures and missing(one, f"{time}_s"):
            reasons.setdefault(f"{requests_needed(f'{time}_s')} requests in each repeat", []).append(
                f"{sample(one)} at {one.load}"
            )
    percentile = time.rpartition("_")[2]
    return [f"{percentile} needs {needed}; there were {', '.join(had)}" for needed, had in reasons.items()]


def bounds(figure: Figure) -> tuple[float, float]:
    """The 95 % interval of a positive figure, cut to a tenth and to ten times its mean, so that one that is not known
    does not shrink the rest of a chart to a point; the mean twice if there is none."""
    if figure.low is None or figure.high is None:
        return figure.mean, figure.mean
    return max(figure.low, figure.mean / 10), min(figure.high, figure.mean * 10)


def short_load(measurement: Measurement) -> str:
    """A load as the label of a point: 4, 12/s, Offline."""
    load = measurement.load
    if load.concurrency is not None:
        return str(load.concurrency)
    return f"{words.figure(load.rate_per_s)}/s" if load.rate_per_s is not None else load.scenario


def pareto_rows(run: Run) -> list[dict[str, Any]]:
    """Tokens/s a user (1 / TPOT p50) and a device, of each contender under each load of a model that generates. `cost`:
    of a million tokens that our pipeline drew, in US dollars, where its devices have a price.

    A baseline in this process is on one device, the CPU; what a URL stands for is not known, and counts as many devices
    as ours."""
    price = _price_per_h(run)
    rows: list[dict[str, Any]] = []
    for one in run.measurements:
        tpot, drawn = mean(one, "tpot_p50_s"), mean(one, "tokens_out_per_s")
        if not tpot or not drawn:
            continue
        as_ours = one.contender == OURS or "://" in one.contender
        devices = len(_gpus(run)) or 1 if as_ours else 1
        cost = None if price is None or one.contender != OURS else price / 3600 / drawn * 1e6
        named = "" if cost is None else f", {words.figure(cost)} a million"
        rows.append(
            {
                "contender": one.contender,
                "load": str(one.load),
                "user": 1 / tpot,
                "device": drawn / devices,
                "cost": "-" if cost is None else words.figure(cost),
                "label": f"{short_load(one)}{named}",
            }
        )
    for row in rows:
        peers = [peer for peer in rows if peer["contender"] == row["contender"]]
        row["front"] = not any(
            peer["user"] >= row["user"] and peer["device"] >= row["device"] and peer is not row for peer in peers
        )
    return rows


def _gpus(run: Run) -> set[str]:
    """The devices of the run's plan that are no CPU cores."""
    return {device for device in run.plan.devices if not device.startswith("cpu")}


def _price_per_h(run: Run) -> float | None:
    """Of all devices of the run's plan together, in US dollars; None if they are not all GPUs of one kind that the
    planner's catalogue has a price for."""
    names = set((run.environment.gpu or "").lower().split(", "))
    if len(names) > 1 or "laptop" in min(names) or not all(device in _gpus(run) for device in run.plan.devices):
        return None
    from stageline.runtime.planning.device_kinds import catalogue  # it imports onnx_ir

    words_of = min(names).replace("-", " ").split()
    known = {*words_of, *map("".join, pairwise(words_of))}  # GeForce RTX 4090 is the catalogue's RTX4090
    found = [kind.price_per_h for key, kind in catalogue().items() if key.lower() in known]
    return found[0] * len(_gpus(run)) if found else None


def baseline_rows(run: Run, load: str) -> list[dict[str, Any]]:
    """What contenders are compared by under one load (`statements.compared_figure`), the best first. `ratio`: ours over
    it; None for ours."""
    name = compared_figure(run, load)
    ratios = {one.contender: one.ratio for one in against(run, load)}
    measured = [one for one in of_load(run, load) if mean(one, name) is not None]
    rows = []
    for one in best_first(measured, name):
        low, high = bounds(one.figures[name])
        ratio = ratios.get(one.contender)
        rows.append(
            {
                "contender": one.contender,
                "load": load,
                "value": one.figures[name].mean,
                "low": low,
                "high": high,
                "shown": wording.with_doubt(one.figures[name]),
                "ratio": None if ratio is None else ratio.value,
                "compared": "-" if ratio is None else wording.times(ratio),
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


def ladder_rows(name: str, measurement: Measurement, what: str) -> list[dict[str, Any]]:
    """A ladder for the chart, as far as at least one request lies beyond. `nines` stretches the slow end: 0 at p0, 1 at
    p90, 2 at p99, 3 at p99.9."""
    return [
        {
            "run": name,
            "percentile": percentile,
            "nines": min(4.0, -math.log10(max(1e-9, 1 - percentile / 100))),
            "seconds": value,
        }
        for percentile, value in zip(LADDER, measurement.ladders.get(what, ()), strict=False)
        if math.isfinite(value) and (1 - percentile / 100) * measurement.requests >= 1
    ]


def load_rows(run: Run, contender: str = OURS) -> list[dict[str, str]]:
    """A table of one contender: a line for each load. Of a model that generates, prefill (TTFT, tokens read) and decode
    (TPOT, tokens drawn) stand apart."""
    names = ["requests_per_s", "goodput_per_s", "latency_p50_s", "latency_p99_s"]
    if run.settings.output_tokens is not None:
        names += ["tokens_in_per_s", "ttft_p50_s", "tokens_out_per_s", "tpot_p50_s"]
    measured = [one for load in loads(run, contender) for one in of_load(run, load) if one.contender == contender]
    known = [name for name in names if any(name in one.figures for one in measured)]
    return [
        {
            "load": str(one.load),
            "requests": f"{one.requests:,}",
            **{wording.label(name): wording.said(one, name, unit=False) for name in known},
        }
        for one in measured
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

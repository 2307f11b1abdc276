"""The tables that `stageline bench` prints: runs, measurements and changes."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from stageline.exporter.commands.show import table
from stageline.runtime import words
from stageline.runtime.bench.compare import FigureChange
from stageline.runtime.bench.records import Figure, Measurement, Run, RunLine

_COLUMNS = {
    "requests_per_s": "requests/s",
    "samples_per_s": "samples/s",
    "tokens_per_s": "tokens/s",
    "goodput_per_s": "in SLO/s",
    "latency_p50_s": "p50",
    "latency_p90_s": "p90",
    "latency_p99_s": "p99",
    "latency_max_s": "max",
    "ttft_p50_s": "TTFT p50",
    "ttft_p99_s": "TTFT p99",
    "tpot_p50_s": "TPOT p50",
    "tpot_p99_s": "TPOT p99",
    "bubble_ratio": "bubble",
    "energy_per_token_j": "J/token",
}


def run(found: Run) -> str:
    """A run: where and how it was measured, and its results."""
    settings, place = found.settings, found.environment
    stages = " + ".join(map(str, found.plan.blocks))
    head = [
        f"{found.id}  {found.name}  {found.status}{f': {found.error}' if found.error else ''}",
        f"{found.bundle} ({found.model}, {found.task}, {found.dtype}), "
        f"blocks {stages} on {' '.join(found.plan.devices)}, {settings.pipeline.engine}"
        f"{f' {settings.pipeline.quantise}' if settings.pipeline.quantise else ''}",
        f"{settings.inputs}, {settings.output_tokens or 'no'} new tokens; {settings.repeats} repeats of "
        f"{settings.seconds:g} s; ± is the 95 % confidence interval (Student's t over the repeats)",
        f"{place.machine}, {place.cores} cores, {words.size(place.memory_bytes)}"
        f"{f', {place.gpu}' if place.gpu else ''}; commit {place.commit or 'unknown'}",
    ]
    by_load: dict[str, list[Measurement]] = {}
    for measurement in found.measurements:
        by_load.setdefault(str(measurement.load), []).append(measurement)
    blocks = [f"{load}\n{measurements(measured)}" for load, measured in by_load.items()]
    notes = list(dict.fromkeys(note for m in found.measurements for note in m.notes))
    return "\n\n".join(["\n".join(head), *blocks, *(["\n".join(notes)] if notes else [])])


def measurements(measured: Sequence[Measurement]) -> str:
    """The contenders under one load, and their stages, if any."""
    names = [name for name in _COLUMNS if any(name in one.figures for one in measured)]
    rows = [[one.contender, *(_figure(one.figures.get(name)) for name in names)] for one in measured]
    lines = [table(["", *(_COLUMNS[name] for name in names)], rows)]
    for one in measured:
        for stage in one.stages:
            whole = stage.busy_s + stage.copy_s + stage.idle_s or math.inf
            lines.append(
                f"  {one.contender}, stage {stage.stage} ({stage.blocks} blocks, {stage.device}): {stage.runs} runs, "
                f"busy {stage.busy_s / whole:.0%}, copying {stage.copy_s / whole:.1%}, idle {stage.idle_s / whole:.0%}"
            )
        others = [
            f"{name} {_figure(one.figures[key])}"
            for key, name in {"hop_overhead_s": "hop", "queue_depth": "queue", "host_memory_bytes": "memory",
                              "device_memory_bytes": "GPU memory", "power_w": "power"}.items()
            if key in one.figures
        ]  # fmt: skip
        if others:
            lines.append(f"  {one.contender}: {', '.join(others)}")
    return "\n".join(lines)


def runs(lines: Sequence[RunLine]) -> str:
    """A list of runs, each with its first measurement."""
    rows = []
    for line in lines:
        first = line.headlines[0] if line.headlines else None
        rows.append(
            [
                line.id,
                datetime.fromtimestamp(line.created, UTC).strftime("%Y-%m-%d %H:%M"),
                line.status if line.status != "running" else f"running {line.progress.share:.0%}",
                line.bundle,
                "-" if first is None else first.load,
                "-" if first is None or first.requests_per_s is None else f"{first.requests_per_s:.4g}",
                "-" if first is None or first.latency_p50_s is None else words.seconds(first.latency_p50_s),
                "-" if first is None or first.latency_p99_s is None else words.seconds(first.latency_p99_s),
            ]
        )
    return table(["run", "made (UTC)", "status", "bundle", "load", "requests/s", "p50", "p99"], rows)


def changes(found: Sequence[FigureChange]) -> str:
    """A comparison, one figure per line."""
    rows = [
        [
            change.contender,
            change.load,
            change.figure,
            _figure(change.before),
            _figure(change.after),
            f"{change.change:+.1%}",
            "one repeat" if change.low is None or change.high is None else f"{change.low:+.1%} to {change.high:+.1%}",
            change.verdict,
        ]
        for change in found
    ]
    return table(["contender", "load", "figure", "before", "after", "change", "95 % confidence", ""], rows)


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.unit == "s":
        shown = words.seconds(figure.mean)
    elif figure.unit == "bytes":
        shown = words.size(figure.mean)
    else:
        shown = f"{figure.mean:.4g}"
    if figure.high is None or not figure.mean:
        return shown
    return f"{shown} ±{(figure.high - figure.mean) / abs(figure.mean):.0%}"

"""The tables that `stageline bench` prints: runs, measurements and changes, as wide as the terminal, in its colours."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic
from rich.console import Console
from rich.table import Table
from rich.text import Text
from stageline.runtime import words
from stageline.runtime.bench.compare import FigureChange, missing
from stageline.runtime.bench.records import OURS, Measurement, Run, RunLine
from stageline.runtime.report import wording
from stageline.runtime.report.quality import quality
from stageline.runtime.report.statements import against, capacity_lines

_PIPED = 100
"""Columns where stdout is no terminal."""
_STYLES = {"better": "green", "worse": "bold red", "undecided": "yellow", "same": "dim"}


def plain(found: Run) -> Any:
    """A run as one JSON document holds it."""
    return pydantic.TypeAdapter(Run).dump_python(found, mode="json")


def run(found: Run) -> str:
    """A run: where and how it was measured, and its results, a table for each load."""
    settings, place = found.settings, found.environment
    stages = " + ".join(map(str, found.plan.blocks))
    drawn = "no" if settings.output_tokens is None else f"on average {settings.output_tokens}"
    head: list[Any] = [
        Text(f"{found.id}  {found.name}  {found.status}{f': {found.error}' if found.error else ''}", "bold"),
        Text(
            f"{found.bundle} ({found.model}, {found.task}, {found.dtype}), blocks {stages} on "
            f"{' '.join(found.plan.devices)}, {settings.pipeline.engine}"
            f"{f' {settings.pipeline.quantise}' if settings.pipeline.quantise else ''}"
        ),
        Text(
            f"{settings.inputs}, {drawn} new tokens; {settings.repeats} repeats of "
            f"{settings.seconds:g} s; ± is the 95 % confidence interval (Student's t over the repeats)"
        ),
        Text(
            f"{place.machine}, {place.cores} cores, {words.size(place.memory_bytes)}"
            f"{f', {place.gpu}' if place.gpu else ''}; commit {place.commit or 'unknown'}"
        ),
    ]
    by_load: dict[str, list[Measurement]] = {}
    for measurement in found.measurements:
        by_load.setdefault(str(measurement.load), []).append(measurement)
    head += [Text(quality(found.quality))] if found.quality else []
    for load, measured in by_load.items():
        head += ["", *_load(load, measured), *(Text(one.text) for one in against(found, load))]
    head += [Text(line) for line in ("", *capacity_lines(found))]
    notes = list(dict.fromkeys(note for m in found.measurements for note in m.notes))
    return _drawn(*head, *(["", Text("\n".join(notes))] if notes else []))


def _load(load: str, measured: Sequence[Measurement]) -> list[Any]:
    """The contenders under one load, and the stages of those that have them."""
    counts = ", ".join(f"{one.contender} {words.counted(one.requests, 'request')}" for one in measured)
    drawn: list[Any] = [Text.assemble((load, "bold"), f": {counts}")]
    names = wording.key_figures(measured)
    columns = _table(["", *(one.contender for one in measured)], right=range(1, 1 + len(measured)))
    for name in names:
        columns.add_row(wording.label(name), *(wording.said(one, name, unit="_per_s" not in name) for one in measured))
    drawn.append(columns)
    why = dict.fromkeys(reason for one in measured for name in names if (reason := missing(one, name)))
    drawn += [Text(f"- {reason}", "dim") for reason in why]
    for one in measured:
        for stage in one.stages:
            whole = stage.busy_s + stage.copy_s + stage.idle_s or 1.0
            drawn.append(
                Text(
                    f"  {one.contender}, stage {stage.stage} ({words.counted(stage.blocks, 'block')}, {stage.device}): "
                    f"{words.counted(stage.runs, 'run')}, busy {stage.busy_s / whole:.0%}, copying "
                    f"{stage.copy_s / whole:.1%}, idle {stage.idle_s / whole:.0%}"
                )
            )
    return drawn


def runs(lines: Sequence[RunLine]) -> str:
    """A list of runs, each with the load where our pipeline answers most requests/s."""
    columns = _table(["run", "made (UTC)", "status", "bundle", "load", "requests/s", "p50", "of"], right=(5, 6, 7))
    for line in lines:
        best = max(
            (one for one in line.headlines if one.contender == OURS and one.requests_per_s is not None),
            key=lambda one: one.requests_per_s or 0.0,
            default=None,
        )
        columns.add_row(
            line.id,
            datetime.fromtimestamp(line.created, UTC).strftime("%m-%d %H:%M"),
            line.status if line.status != "running" else f"running {line.progress.share:.0%}",
            Path(line.bundle).name,
            "-" if best is None else best.load,
            "-"
            if best is None
            else f"{words.figure(best.requests_per_s or 0.0)} {wording.doubt(best.spread)}".rstrip(),
            "-" if best is None or best.latency_p50_s is None else words.seconds(best.latency_p50_s),
            "-" if best is None or best.requests is None else f"{best.requests:,}",
        )
    return _drawn(columns)


def changes(found: Sequence[FigureChange]) -> str:
    """A comparison: a table for each contender and load, the verdict first."""
    by_key: dict[str, list[FigureChange]] = {}
    for one in found:
        by_key.setdefault(f"{one.contender}, {one.load}", []).append(one)
    drawn: list[Any] = []
    for key, ones in by_key.items():
        columns = _table(["", "", "before", "after", "after is", "95 % confidence"], right=(2, 3, 4))
        for one in ones:
            verdict = Text(one.verdict, _STYLES[one.verdict])
            before, after = wording.sides(one)
            interval = wording.certainty(one).removeprefix("95 %: ")
            columns.add_row(verdict, wording.label(one.figure), before, after, wording.change(one), interval)
        drawn += [Text(key, "bold"), columns]
    return _drawn(*drawn)


def _table(head: Sequence[str], right: Sequence[int]) -> Table:
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(head):
        columns.add_column(name, justify="right" if place in right else "left", overflow="fold")
    return columns


def _drawn(*parts: Any) -> str:
    """What rich makes of these, for stdout: colours and the width are the terminal's; a pipe gets plain text."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED, color_system=None)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

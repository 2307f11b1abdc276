"""A report of runs as a document: statements, tables and charts in order, whatever format they are written in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

from stageline.runtime import words
from stageline.runtime.bench.compare import MARGIN, FigureChange, compare, incomparable, missing, overall
from stageline.runtime.bench.records import OURS, Run, Slo
from stageline.runtime.report import charts, rows, sentences, statements, wording
from stageline.runtime.report.quality import quality
from stageline.runtime.report.spec import Spec, dressed

WIDTH = 680
"""Of charts, in pixels."""


@dataclass(frozen=True)
class Heading:
    """Opens a section; level 1 is the document's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One statement or more. `command`: what to type, set in code after it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Table:
    """Cells of text under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite spec with its data. `name` suits a file; `sentence` says what it shows."""

    name: str
    sentence: str
    spec: Spec = field(repr=False)


Block: TypeAlias = Heading | Paragraph | Table | Chart


def document(runs: Sequence[Run]) -> list[Block]:
    """The report of one or more runs: each by itself, then each pair that can be compared, and why others cannot."""
    blocks: list[Block] = [Heading("Stageline benchmark", 1)]
    for number, run in enumerate(runs, start=1):
        blocks += _of_run(run, f"run{number}")
    pairs = list(combinations(sorted(runs, key=lambda run: run.created), 2))
    if pairs:
        blocks.append(Heading("Comparison"))
    for before, after in pairs:
        blocks += _of_pair(before, after)
    blocks.append(
        Paragraph(
            "± and intervals are of 95 % confidence over the repeats: Student's t for one figure, Welch's on the "
            "logarithm for ratios. A dash: the sample does not carry that figure."
        )
    )
    return blocks


def _of_run(run: Run, name: str) -> list[Block]:
    settings, place = run.settings, run.environment
    blocks: list[Block] = [Heading(f"{Path(run.bundle).name}, {words.counted(len(run.plan.blocks), 'stage')}")]
    answer = statements.answer(run)
    if answer is not None:
        blocks.append(Paragraph(f"{answer.achieved} {answer.rest}", answer.command))
    blocks += [Paragraph(text) for text in statements.capacity_lines(run)]
    blocks += [Paragraph(quality(run.quality))] if run.quality else []
    gpu = f", {place.gpu}" if place.gpu else ""
    engine = " ".join(filter(None, (settings.pipeline.engine, settings.pipeline.quantise)))
    blocks.append(
        Paragraph(
            f"Run {run.id}, {words.clock(run.created)}: {run.model}, {run.dtype}, "
            f"{' + '.join(map(str, run.plan.blocks))} blocks on {' '.join(run.plan.devices)}, {engine}. "
            f"{settings.inputs}; up to "
            f"{words.counted(settings.repeats, 'repeat')} of {settings.seconds:g} s. {place.machine}, "
            f"{words.counted(place.cores, 'core')}{gpu}; commit {place.commit or 'unknown'}."
        )
    )
    blocks += _charts(run, name, str(answer.best.load) if answer else None)
    for load in statements.loads(run):
        blocks += _of_load(run, load)
    notes = list(dict.fromkeys(note for one in run.measurements for note in one.notes))
    return [*blocks, *map(Paragraph, notes)]


def _charts(run: Run, name: str, load: str | None) -> list[Block]:
    unit = statements.throughput_unit(run)
    drawn: list[Block] = []
    for time, label in (("latency_p50", "Latency p50"), ("ttft_p50", "TTFT p50"), ("tpot_p50", "TPOT p50")):
        points = rows.curve_rows(run, time)
        if points:
            bound = _bound(run.settings.slo, time)
            spec = charts.curve(points, unit, label, bound)
            drawn.append(_chart(f"{name}-{time.partition('_')[0]}", sentences.of_curve(points, unit, label), spec))
    front = rows.pareto_rows(run)
    if len(front) > 1:
        drawn.append(_chart(f"{name}-pareto", sentences.of_pareto(front), charts.pareto(front)))
    if load is not None:
        bars = rows.baseline_rows(run, load)
        if len(bars) > 1:
            figure = statements.compared_figure(run, load)
            drawn.append(_chart(f"{name}-baselines", sentences.of_bars(bars, figure), charts.baselines(bars, figure)))
        (ours,) = (one for one in statements.of_load(run, load) if one.contender == OURS)
        if ours.stages:
            time_spent = rows.stage_rows(ours)
            drawn.append(_chart(f"{name}-stages", sentences.of_stages(time_spent), charts.stages(time_spent)))
    return drawn


def _bound(slo: Slo, time: str) -> float | None:
    bounds = {"latency": slo.latency_s, "ttft": slo.ttft_s, "tpot": slo.tpot_s}
    return bounds[time.partition("_")[0]]


def _chart(name: str, sentence: str, spec: Spec) -> Chart:
    return Chart(name, sentence, {**dressed(spec, "light", sentence), "width": WIDTH, "background": "white"})


def _of_load(run: Run, load: str) -> list[Block]:
    measured = statements.of_load(run, load)
    names = wording.key_figures(measured)
    table = [("requests measured", *(f"{one.requests:,}" for one in measured))]
    table += [
        (wording.label(name), *(wording.said(one, name, "_per_s" not in name) for one in measured)) for name in names
    ]
    blocks: list[Block] = [Heading(load[0].upper() + load[1:], 3)]
    blocks += [Paragraph(one.text) for one in statements.against(run, load)]
    blocks.append(Table(("", *(one.contender for one in measured)), tuple(table)))
    reasons = list(dict.fromkeys(why for one in measured for name in names if (why := missing(one, name))))
    return [*blocks, *([Paragraph(f"Dashes: {'; '.join(reasons)}.")] if reasons else [])]


def _of_pair(before: Run, after: Run) -> list[Block]:
    blocks: list[Block] = [Heading(f"{before.id} → {after.id}", 3)]
    reason = incomparable(before, after)
    if reason is not None:
        return [*blocks, Paragraph(f"Not compared: {reason}.")]
    found = compare(before, after)
    verdict = wording.VERDICTS[overall(found)]
    return [*blocks, Paragraph(f"{verdict}, margin {wording.percent(MARGIN)}."), _changes(found)]


def _changes(found: Sequence[FigureChange]) -> Table:
    head = ("verdict", "contender", "load", "figure", "is now", "95 % confidence", "before", "after")
    lines = [
        (
            one.verdict, one.contender, one.load, wording.label(one.figure), wording.change(one),
            wording.certainty(one).removeprefix("95 %: "), *wording.sides(one),
        )
        for one in found
    ]  # fmt: skip
    return Table(head, tuple(lines))

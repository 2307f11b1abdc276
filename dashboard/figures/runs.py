"""Data of the Overview and Compare pages: runs by model, headline cards, changes as a matrix of figures and loads."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stageline.runtime import words
from stageline.runtime.bench.compare import FigureChange, missing, same_model
from stageline.runtime.bench.records import OURS, Measurement, Run, RunLine, Slo
from stageline.runtime.report import wording
from stageline.runtime.report.statements import mean, throughput_name

figure_label, figure_text = wording.label, wording.value


def by_model(lines: Iterable[RunLine]) -> dict[str, list[RunLine]]:
    """Runs by model, whatever its cut, newest first; the model with the newest run first. The keys name the model: the
    shortest name of its bundles, told apart by the folder where two models have the same."""
    groups: list[list[RunLine]] = []
    for line in lines:
        group = next((group for group in groups if same_model(group[0], line)), None)
        if group is None:
            groups.append([line])
        else:
            group.append(line)
    names = [min((short(line.bundle) for line in group), key=len) for group in groups]
    return {
        name if names.count(name) == 1 else f"{name} ({Path(group[0].bundle).parent})": group
        for name, group in zip(names, groups, strict=True)
    }


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


def other_cuts(lines: Iterable[RunLine], line: RunLine) -> list[RunLine]:
    """The newest complete run of each other bundle of the same model, at most three: its other cuts."""
    found: dict[str, RunLine] = {}
    for one in lines:
        if one.bundle != line.bundle and one.status == "done" and one.headlines and same_model(one, line):
            found.setdefault(one.bundle, one)
    return list(found.values())[:3]


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


@dataclass(frozen=True)
class Card:
    """A headline number as text, its doubt, and what it is."""

    label: str
    value: str
    doubt: str
    about: str


def cards(run: Run, measurement: Measurement) -> list[Card]:
    """The headline numbers of one load: throughput first, then latency. A
    percentile that its sample does not carry is a dash, with the reason."""
    wanted = {
        wording.label(throughput_name(run)).capitalize(): throughput_name(run),
        "In SLO/s": "goodput_per_s",
        "Latency p50": "latency_p50_s",
        "Latency p99": "latency_p99_s",
        "TTFT p50": "ttft_p50_s",
        "TPOT p50": "tpot_p50_s",
    }
    found = []
    for label, name in wanted.items():
        figure = measurement.figures.get(name)
        if figure is None or not math.isfinite(figure.mean):
            continue
        lacking = missing(measurement, name)
        if lacking:
            found.append(Card(label, "-", "too few", lacking))
        else:
            about = f"{measurement.load}, {words.counted(len(figure.values), 'repeat')}"
            alone = "one repeat" if len(figure.values) < 2 else "every repeat"
            found.append(Card(label, wording.value(figure, unit=False), wording.doubt(figure.spread) or alone, about))
    return found


def fullest(run: Run, contender: str = OURS) -> Measurement | None:
    """The measurement of a contender with the highest throughput."""
    name = throughput_name(run)
    known = [one for one in run.measurements if one.contender == contender and mean(one, name) is not None]
    return max(known, key=lambda one: mean(one, name) or 0.0, default=None)


def matrix(found: Sequence[FigureChange], contender: str = OURS) -> list[dict[str, str]]:
    """Figures by loads: how many times the figure is, and the verdict."""
    rows: dict[str, dict[str, str]] = {}
    for one in found:
        if one.contender == contender:
            row = rows.setdefault(one.figure, {"figure": wording.label(one.figure)})
            times = wording.change(one).removesuffix(" times")
            row[one.load] = one.verdict if times == "-" else f"{one.verdict} {times}×"
    return list(rows.values())


def change_table(found: Sequence[FigureChange]) -> list[dict[str, str]]:
    """Rows of a table, the verdict first: how many times the figure is, and how sure that is."""
    return [
        {
            "verdict": one.verdict,
            "figure": wording.label(one.figure),
            "is now": wording.change(one),
            "95 % confidence": wording.certainty(one).removeprefix("95 %: "),
            **dict(zip(("before", "after"), wording.sides(one), strict=True)),
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

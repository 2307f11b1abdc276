"""The command that judges stored runs: `stageline bench compare`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from stageline.exporter.commands import bench_show, common
from stageline.runtime import words
from stageline.runtime.bench.compare import JUDGED, FigureChange, compare, overall
from stageline.runtime.bench.records import OURS
from stageline.runtime.bench.store import Store


def compare_command(
    before: Annotated[str, typer.Argument(metavar="A", help="The run to compare with.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The run to judge.")],
    margin: Annotated[float, typer.Option(min=0, help="Changes within so many percent are none.")] = 5.0,
    figure: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Judge this figure (repeatable).")] = None,
    store: common.StoreOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Say of each figure whether run B is better, worse or the same as run A; exit with 1 if the pipeline is worse.

    The same: the whole 95 % confidence interval of B over A lies within the margin. Better or worse: it leaves out 1,
    the ratio is beyond the margin, and so many figures do not differ by chance. Otherwise undecided. Runs of different
    models or loads are refused. The interval is Welch's of the logarithms of the repeats.

    Example: stageline bench compare latest~1 latest
    """
    from stageline.runtime.bench.figures import MEANINGS

    for name in figure or ():
        if name not in MEANINGS:
            raise typer.BadParameter(f"unknown figure {name!r}; known: {', '.join(MEANINGS)}", param_hint="--figure")
    found = Store(store)
    changes = compare(found.run(found.find(before)), found.run(found.find(after)), margin / 100, figure or JUDGED)
    verdict = overall(changes)
    plain = [{**asdict(change), "verdict": change.verdict} for change in changes]
    document = {"verdict": verdict, "changes": plain}
    common.print_result(as_json, document, f"{bench_show.changes(changes)}\n{_summary(changes, verdict, margin)}")
    raise typer.Exit(1 if verdict == "worse" else 0)


def _summary(changes: Sequence[FigureChange], verdict: str, margin: float) -> str:
    """The verdict with what it rests on, and whether contenders that are not ours moved as well."""
    ours = [change.verdict for change in changes if change.contender == OURS]
    counted = ", ".join(f"{ours.count(one)} {one}" for one in dict.fromkeys(ours))
    lines = [f"{verdict}: of {words.counted(len(ours), 'figure')} of the pipeline {counted} (margin {margin:g} %)"]
    for contender in dict.fromkeys(change.contender for change in changes if change.contender != OURS):
        theirs = overall(changes, contender)
        if theirs in ("better", "worse"):
            lines.append(f"{contender}, which is no part of Stageline, is {theirs}: was the machine as free?")
    return "\n".join(lines)

"""The command `stageline bench report`: runs as a document to send."""

from pathlib import Path
from typing import Annotated

import typer
from stageline.exporter.commands import common
from stageline.runtime.bench.store import Store


def report_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids, beginnings of ids, latest, or latest~1.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="File ending with .html, .md, .svg or .png.")
    ],
    store: common.StoreOption = None,
) -> None:
    """Write a report: whether each run is good, its curves, baselines and tables, and what changed between runs.

    .html is one file that needs no network. .md has its charts beside it. .svg and .png write each chart as a picture.
    Charts need the extra `report`.

    Example: stageline bench report latest~1 latest -o report.html
    """
    from stageline.runtime.report.document import document
    from stageline.runtime.report.formats import save

    found = Store(store)
    for file in save(document([found.run(found.find(run)) for run in runs]), output):
        print(file)

"""The commands `stageline bench BUNDLE` and `stageline bench list`, `show`, `export`, `import`, `delete`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from stageline.exporter.commands import bench_show, common
from stageline.exporter.commands.bench_judge import compare_command
from stageline.exporter.commands.bench_report import report_command
from stageline.exporter.commands.bench_run import run_command
from stageline.models.errors import StagelineError
from stageline.runtime.bench import files
from stageline.runtime.bench.store import Store
from typer.core import TyperGroup

_RUN = "run"


class _DefaultToRun(TyperGroup):
    """`stageline bench BUNDLE ...` means `stageline bench run BUNDLE ...`, unless BUNDLE is a command's name."""

    default = _RUN

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help",):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DefaultToRun, rich_markup_mode=None, pretty_exceptions_enable=False)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="An id, the beginning of one, latest, or latest~1.")]


def register(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    parent.add_typer(
        app,
        name="bench",
        help="Measure a bundle against baselines and keep the results.\n\n"
        "Options of a run: stageline bench run --help. A bundle with the name of a command: ./list.\n\n"
        "Example: stageline bench minilm.bundle --baseline onnxruntime",
    )


app.command(_RUN)(run_command)


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, help="Max runs to list.")] = 20,
    store: common.StoreOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """List the runs in the store, newest first.

    Example: stageline bench list
    """
    found = Store(store)
    lines = found.runs(limit)
    empty = f"no runs in {found.path}; make one with: stageline bench BUNDLE"
    common.print_result(as_json, list(map(asdict, lines)), bench_show.runs(lines) if lines else empty)


@app.command("show")
def show_command(
    run: RunArgument = "latest", store: common.StoreOption = None, as_json: common.JsonOption = False
) -> None:
    """Show a run: where it took place, and its measurements.

    Example: stageline bench show latest
    """
    found = Store(store)
    done = found.run(found.find(run))
    common.print_result(as_json, bench_show.plain(done), bench_show.run(done))


app.command("compare")(compare_command)
app.command("report")(report_command)


@app.command("export")
def export_command(
    run: RunArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="File ending with .json, .csv or .parquet.")
    ],
    store: common.StoreOption = None,
) -> None:
    """Write a run to a file: JSON holds everything, CSV and Parquet are tables of its requests.

    Example: stageline bench export latest -o run.parquet
    """
    found = Store(store)
    files.save(files.read(found, found.find(run)), output)
    print(output)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `stageline bench export`.")],
    store: common.StoreOption = None,
) -> None:
    """Read an exported run into the store.

    Example: stageline bench import run.json
    """
    exported = files.load(file)
    Store(store).put(exported.run, exported.requests, exported.timelines)
    print(exported.run.id)


@app.command("cancel")
def cancel_command(run: RunArgument, store: common.StoreOption = None) -> None:
    """Ask the process of a run to stop; measurements so far are kept.

    Example: stageline bench cancel latest
    """
    found = Store(store)
    run_id = found.find(run)
    if not found.cancel(run_id):
        raise StagelineError(f"run {run_id} is not running; see stageline bench list")
    print(run_id)


@app.command("delete")
def delete_command(run: RunArgument, store: common.StoreOption = None) -> None:
    """Remove a run and all its requests from the store.

    Example: stageline bench delete 20260131-235959-a1b2c3
    """
    found = Store(store)
    run_id = found.find(run)
    found.delete(run_id)
    print(run_id)

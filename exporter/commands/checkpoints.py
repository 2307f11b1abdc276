"""The commands `stageline models list`, `fetch` and `synthesize`: reference checkpoints and synthetic ones."""

from pathlib import Path
from typing import Annotated

import typer
from stageline.exporter.commands import common, hub
from stageline.exporter.commands.show import table
from stageline.models.catalogue import CATALOGUE, default_root, fetch
from stageline.models.hub_name import HubName
from stageline.models.json_file import read_json_object
from stageline.runtime import words


def register(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("list")(list_command)
    app.command("fetch")(fetch_command)
    app.command("synthesize")(synthesize_command)
    parent.add_typer(app, name="models", help="List and fetch reference checkpoints, or make synthetic ones.")


def list_command(as_json: common.JsonOption = False) -> None:
    """List the reference checkpoints.

    Example: stageline models list
    """
    rows = [[name, words.size(e.size_bytes), e.license, e.description] for name, e in CATALOGUE.items()]
    entries = [
        {"name": name, "size_bytes": e.size_bytes, "license": e.license, "description": e.description}
        for name, e in CATALOGUE.items()
    ]
    common.print_result(as_json, entries, table(["name", "download", "license", "description"], rows))


def fetch_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name that `stageline models list` shows, or ORG/NAME[@REVISION][:FILE] on the Hub."
        ),
    ],
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of all checkpoints (default: models/checkpoints).")
    ] = None,
) -> None:
    """Download a checkpoint and print where it is: a reference checkpoint with pip, another one from the Hub.

    Example: stageline models fetch minilm
    """
    on_hub = HubName.parse(name)
    if on_hub is not None:
        if into is not None:
            raise common.UsageError("--into is for reference checkpoints; HF_HUB_CACHE places those of the Hub")
        print(hub.fetched(on_hub).path)
        return
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn

    with common.progress_bar("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = None if bar is None else bar.add_task(name, total=None)

        def follow(done: int, total: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total)

        folder = fetch(name, into or default_root(), follow)
    print(folder)


def synthesize_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG_JSON", help="A config.json of transformers.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The new checkpoint's folder.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    sparse: Annotated[bool, typer.Option("--sparse", help="Shapes only: all weights zero, no disk used.")] = False,
    dtype: Annotated[common.DtypeName, typer.Option(help="Weights' type.")] = "float32",
) -> None:
    """Make a synthetic checkpoint of any shape, with random weights or with none.

    Example: stageline models synthesize config.json -o big --sparse --dtype bfloat16
    """
    with common.needs(*common.EXPORTER):
        from stageline.exporter.synthesize import synthesize
    synthesize(read_json_object(config), output, seed=None if sparse else seed, dtype=dtype)
    print(output)

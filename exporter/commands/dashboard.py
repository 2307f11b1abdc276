"""The command `stageline dashboard`, which starts the dashboard as a program: the exporter does not import it."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from stageline.exporter.commands.common import HostOption, StoreOption
from stageline.models.errors import StagelineError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("dashboard")(dashboard_command)


def dashboard_command(
    store: StoreOption = None,
    bundles: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A bundle, or a folder of bundles (default: ./bundles). May be repeated."),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port to listen on (default: 8501, or the next free one).")
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A service on another machine that pages may read. May be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further host name to answer to, such as a proxy's. May be repeated."),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show all, but start and stop nothing from the pages.")
    ] = False,
) -> None:
    """Open the dashboard: benchmark runs, plans and live pipelines in a browser.

    It listens on localhost (default) and answers only to its own host names. Pages read services on this machine, and
    others only where --service names them; all else stays on this machine.

    Example: stageline dashboard --bundles bundles
    """
    if importlib.util.find_spec("streamlit") is None:
        raise StagelineError('this command needs the dashboard: pip install "stageline[dashboard]"')
    options = ["--host", host]
    options += ["--port", str(port)] if port else []
    options += ["--store", str(store.resolve())] if store else []
    options += [word for folder in bundles or [] for word in ("--bundles", str(folder.resolve()))]
    options += [word for address in service or [] for word in ("--service", address)]
    options += [word for name in allow_host or [] for word in ("--allow-host", name)]
    options += ["--read-only"] if read_only else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "stageline.dashboard", *options])

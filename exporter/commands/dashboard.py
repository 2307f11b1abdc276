"""The command `stageline dashboard`. It starts the dashboard as a program: the exporter imports nothing of it."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from stageline.models.errors import StagelineError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("dashboard")(dashboard_command)


def dashboard_command(
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where benchmark runs are kept; as for stageline bench.")
    ] = None,
    bundles: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A bundle, or a folder of bundles: ./bundles unless given. May be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="8501, or the next that is free, unless given.")
    ] = None,
) -> None:
    """Open the dashboard: what pipelines give, and why. It listens on this machine only and calls nobody.

    Example: stageline dashboard --bundles bundles
    """
    if importlib.util.find_spec("streamlit") is None:
        raise StagelineError('this command needs the dashboard: pip install "stageline[dashboard]"')
    options = ["--host", host]
    options += ["--port", str(port)] if port else []
    options += ["--store", str(store.resolve())] if store else []
    options += [word for folder in bundles or [] for word in ("--bundles", str(folder.resolve()))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "stageline.dashboard", *options])

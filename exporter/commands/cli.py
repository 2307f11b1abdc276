"""The `stageline` command. What needs torch imports it inside its command: the others start fast and without it."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from pydantic import ValidationError
from stageline.exporter.commands import (
    bench,
    build,
    bundles,
    chat,
    checkpoints,
    dashboard,
    doctor,
    eject,
    layers,
    plan,
    run,
    run_batch,
    serve,
    stage,
    verify,
)
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.validation import first_error

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: this process's) and return its exit status."""
    try:
        return int(app(args=arguments, prog_name="stageline", standalone_mode=False) or 0)
    except typer.TyperException as error:
        return _failed(_usage(error, sys.argv[1:] if arguments is None else arguments), error.exit_code)
    except StagelineError as error:
        return _failed(str(error), 1)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - Python flushes it once more when it ends
        return 1
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130


@app.callback(invoke_without_command=True)
def stageline(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Cut a Transformer checkpoint into pipeline stages and run them as one pipeline.

    Example: stageline export models/checkpoints/minilm -o minilm.bundle --stages 2
    """
    if show_version:
        print(f"stageline {version('stageline')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


for command in (
    bundles, verify, eject, run, chat, plan, layers, build, serve, stage, run_batch, bench, doctor, dashboard,
    checkpoints,
):  # fmt: skip
    command.register(app)


def _usage(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """What is wrong with the command line, and the help of the command that was meant. typer checks values with
    pydantic: its words are replaced by ours."""
    if isinstance(error, typer.BadParameter) and isinstance(error.__cause__, ValidationError):
        error.message = first_error(error.__cause__)
    context = getattr(error, "ctx", None)
    command = _meant(arguments) if context is None else context.command_path
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def _meant(arguments: Sequence[str]) -> str:
    """The command that the first arguments name."""
    words, found = ["stageline"], typer.main.get_command(app)
    for argument in arguments:
        commands = getattr(found, "commands", {})
        name = argument if argument in commands else getattr(found, "default", None)
        if name is None:
            break
        words.append(name)
        found = commands[name]
    return " ".join(words)


def _failed(message: str, status: int) -> int:
    print(f"stageline: {words.line(message)}", file=sys.stderr)
    return status

"""The `stageline` command as a child process: the dashboard runs it, as a user would, instead of importing it."""

import sys

_PROGRAM = "import sys; from stageline.exporter.commands.cli import main; sys.exit(main())"


def stageline(*arguments: str) -> list[str]:
    """The command line of `stageline ARGUMENTS` in this environment, whatever the PATH is."""
    return [sys.executable, "-P", "-c", _PROGRAM, *arguments]

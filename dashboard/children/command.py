"""The `stageline` command as a child process, as a user would run it."""

import sys

_PROGRAM = "import sys; from stageline.exporter.commands.cli import main; sys.exit(main())"


def stageline(*arguments: str) -> list[str]:
    """The command line of `stageline ARGUMENTS` in this environment, independent of PATH."""
    return [sys.executable, "-P", "-c", _PROGRAM, *arguments]

"""The `stageline` command as a child process, as a user would run it, and the reason that it gives for a failure."""

import re
import sys

_PROGRAM = "import sys; from stageline.exporter.commands.cli import main; sys.exit(main())"
_PROGRESS = re.compile(r"\s*\d+% .*|run \S+")


def stageline(*arguments: str) -> list[str]:
    """The command line of `stageline ARGUMENTS` in this environment, independent of PATH."""
    return [sys.executable, "-P", "-c", _PROGRAM, *arguments]


def reason(stderr: str, otherwise: str) -> str:
    """Why the command failed: its last line, or `otherwise` if it said nothing, or only how far it was."""
    said = [line for line in stderr.strip().splitlines() if not _PROGRESS.fullmatch(line)]
    return (said or [otherwise])[-1].removeprefix("stageline: ")

"""Profiles measured from a page: `stageline profile` and `stageline layers` as a child process, one at a time."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stageline.dashboard.children.command import reason, stageline
from stageline.dashboard.children.turn import Turn
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import MANIFEST

_LINE = re.compile(r"\s*(\d+)% (.*)")


@dataclass(frozen=True)
class Profiling:
    """A profile that is being measured, or whose measuring failed: `error` is then its last line."""

    bundle: Path
    share: float
    step: str
    error: str | None = None


class Profiler:
    """Measures for all browsers of a dashboard. Thread-safe."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._child: tuple[Path, subprocess.Popen[bytes], IO[bytes]] | None = None
        turn.ask(self._measuring)

    def start(self, store: Store, bundle: Path, command: str = "profile", options: Sequence[str] = ()) -> None:
        """Begin `stageline COMMAND BUNDLE OPTIONS`. StagelineError if the bundle is gone, or anything else is measured:
        both would disturb each other."""
        with self._turn.lock:
            self._turn.check_free(store)
            if not (bundle / MANIFEST).is_file():
                raise StagelineError(f"the bundle {bundle.name} is gone; choose another")
            stderr = tempfile.TemporaryFile()  # noqa: SIM115 - read while the child runs, and when it has ended
            process = subprocess.Popen(
                stageline(command, str(bundle), *options),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            self._child = bundle, process, stderr

    def now(self) -> Profiling | None:
        """What is being measured, or failed last; None if nothing is, or the last profile was written."""
        with self._turn.lock:
            if self._child is None:
                return None
            bundle, process, stderr = self._child
            stderr.seek(0)
            said = stderr.read().decode(errors="replace")
            status = process.poll()
            if status is None:
                found = next((one for one in map(_LINE.fullmatch, reversed(said.strip().splitlines())) if one), None)
                return Profiling(bundle, int(found[1]) / 100 if found else 0.0, found[2] if found else "opening")
            if status == 0:
                self._child = None
                return None
            return Profiling(bundle, 1.0, "failed", reason(said, f"it ended with status {status}"))

    def _measuring(self) -> str | None:
        alive = self._child is not None and self._child[1].poll() is None
        return f"{self._child[0].name} is being profiled" if alive and self._child else None

"""Benchmarks started from a page: `stageline bench` as a child process that outlives the page, one at a time."""

import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO

from stageline.dashboard.children.command import reason, stageline
from stageline.dashboard.children.order import Order
from stageline.dashboard.children.turn import Turn
from stageline.runtime.bench.options import new_id
from stageline.runtime.bench.store import Store


@dataclass
class _Child:
    process: "subprocess.Popen[bytes]"
    stderr: IO[bytes]


class Launcher:
    """Starts benchmarks for all browsers of a dashboard. Thread-safe."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._children: dict[str, _Child] = {}
        turn.believe(self.failure)
        turn.ask(lambda: f"run {alive} is running" if (alive := self._starting()) else None)

    def start(self, store: Store, order: Order) -> str:
        """Start a run and return its id. StagelineError if anything is measured: both would disturb each
        other."""
        with self._turn.lock:
            self._turn.check_free(store)
            order.check_ready()
            order.cut()
            run_id = new_id()
            stderr = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
            process = subprocess.Popen(
                stageline("bench", "run", *order.arguments(), "--run-id", run_id, "--store", str(store.path)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            self._children[run_id] = _Child(process, stderr)
            return run_id

    def starting(self) -> str | None:
        """The run whose child process is alive, if any."""
        with self._turn.lock:
            return self._starting()

    def failure(self, run_id: str) -> str | None:
        """The last line of a child that failed; None if it did not fail, or was not started here."""
        with self._turn.lock:
            child = self._children.get(run_id)
            if child is None or child.process.poll() in (None, 0):
                return None
            child.stderr.seek(0)
            said = child.stderr.read().decode(errors="replace")
            return reason(said, f"it ended with status {child.process.returncode}")

    def interrupt(self, run_id: str) -> None:
        """End a child that has not begun its run; a run that has begun is cancelled through the store."""
        with self._turn.lock:
            child = self._children.get(run_id)
            if child is not None and child.process.poll() is None:
                child.process.terminate()

    def _starting(self) -> str | None:
        return next((run_id for run_id, child in self._children.items() if child.process.poll() is None), None)

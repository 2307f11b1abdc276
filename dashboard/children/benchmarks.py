"""Benchmarks started from a page: `stageline bench` as a child process that outlives the page, one at a time."""

import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from stageline.dashboard.children.command import stageline
from stageline.models.errors import StagelineError
from stageline.models.user_cache import user_cache
from stageline.runtime.bench.options import new_id
from stageline.runtime.bench.records import RunLine
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import read_manifest
from stageline.runtime.bundle.recut import recut_copy
from stageline.runtime.options import PipelineOptions

_NEWEST = 50  # runs searched for a running one


@dataclass(frozen=True)
class Order:
    """What to measure. Empty texts and tuples leave an option out; `stages` None: the bundle's own stages."""

    bundle: Path
    stages: int | None = None
    scenarios: tuple[str, ...] = ()
    concurrency: str = ""
    rates: str = ""
    seconds: float = 5.0
    repeats: int = 3
    new_tokens: int | None = None
    slo: str = ""
    baselines: tuple[str, ...] = ()
    checkpoint: str = ""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)

    def options(self) -> list[str]:
        """The options of `stageline bench`."""
        found = ["--seconds", f"{self.seconds:g}", "--repeats", str(self.repeats)]
        options = {
            "--scenario": ",".join(self.scenarios),
            "--concurrency": self.concurrency.replace(" ", ""),
            "--rate": self.rates.replace(" ", ""),
            "--new-tokens": self.new_tokens,
            "--slo": self.slo.replace(" ", ""),
            "--checkpoint": self.checkpoint,
            "--threads": self.pipeline.threads,
            "--quantise": self.pipeline.quantise,
        }
        found += [word for name, value in options.items() if value for word in (name, str(value))]
        return found + [word for name in self.baselines for word in ("--baseline", name)]


@dataclass
class _Child:
    process: "subprocess.Popen[bytes]"
    stderr: IO[bytes]


class Launcher:
    """Starts benchmarks for all browsers of a dashboard. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}

    def start(self, store: Store, order: Order) -> str:
        """Start a run and return its id. StagelineError if one is running: two would disturb each other."""
        with self._lock:
            other = self._starting() or next((line.id for line in running(store)), None)
            if other:
                raise StagelineError(f"run {other} is running; wait for its end or cancel it: one at a time")
            bundle = order.bundle if order.stages is None else cut_copy(order.bundle, order.stages)
            run_id = new_id()
            stderr = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
            arguments = [str(bundle), *order.options(), "--run-id", run_id, "--store", str(store.path)]
            process = subprocess.Popen(
                stageline("bench", "run", *arguments, "--name", order.bundle.name),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            self._children[run_id] = _Child(process, stderr)
            return run_id

    def starting(self) -> str | None:
        """The run whose child process is alive, if any."""
        with self._lock:
            return self._starting()

    def failure(self, run_id: str) -> str | None:
        """The last line of a child that failed; None if it did not fail, or was not started here."""
        with self._lock:
            child = self._children.get(run_id)
            if child is None or child.process.poll() in (None, 0):
                return None
            child.stderr.seek(0)
            lines = child.stderr.read().decode(errors="replace").strip().splitlines()
            return (lines or [f"it ended with status {child.process.returncode}"])[-1].removeprefix("stageline: ")

    def interrupt(self, run_id: str) -> None:
        """End a child that has not begun its run; a run that has begun is cancelled through the store."""
        with self._lock:
            child = self._children.get(run_id)
            if child is not None and child.process.poll() is None:
                child.process.terminate()

    def _starting(self) -> str | None:
        return next((run_id for run_id, child in self._children.items() if child.process.poll() is None), None)


def running(store: Store) -> list[RunLine]:
    """The running runs of the store, whoever started them."""
    return [line for line in store.runs(_NEWEST) if line.status == "running"]


def cut_copy(bundle: Path, stages: int) -> Path:
    """A copy of the bundle in the user's cache, cut into `stages` even stages; the bundle itself if it has as many.

    StagelineError if they do not fit the model; OSError if the cache cannot be written.
    """
    if len(read_manifest(bundle).stages) == stages:
        return bundle
    folder = user_cache() / "cuts" / f"{bundle.name}-{stages}-stages"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = recut_copy(bundle, Path(scratch) / bundle.name, stages).path
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        copy.rename(folder)
    return folder

"""Worker processes that build engines, seen from the process that started them."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping

from stageline.runtime.builder.worker import Request

Answer = Mapping[str, object]


class Workers:
    """The running workers. `run` may be called from many threads, `stop` from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, request: Request, progress: Callable[[Answer], None]) -> Answer:
        """Build in a process of its own. `progress` is called with each step; the worker's last message is returned, or
        {"error": how it ended} if it dies without one."""
        command = [sys.executable, "-m", "stageline.runtime.builder.worker", request.model_dump_json()]
        with tempfile.TemporaryFile() as errors:
            with self._lock:
                if self._stopped:
                    return {"error": "the build was stopped"}
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
                self._running.add(process)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    document: Answer = json.loads(line)
                    if "phase" not in document:
                        return document
                    progress(document)
            finally:
                with self._lock:
                    self._running.discard(process)
                with process:  # closes the pipe, which ends a worker that still runs, and waits
                    pass
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        if process.returncode == -signal.SIGKILL:
            how += ", as where memory is short (bound it: --max-memory)"
        return {"error": f"the builder ended with {how}" + (f": {lines[-1]}" if lines else "")}

    def stop(self) -> None:
        """End all workers, and refuse new ones."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

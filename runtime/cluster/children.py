"""Processes of our own that host a stage each, so that one that crashes takes nothing else along.

A child is a host for its parent alone: it listens on this machine, with a key that it reads from its standard input,
and ends when that is closed, as it is when the parent ends however it does.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stageline.models.errors import EngineError


class Child:
    """A process that hosts stages of a bundle on a device, and on `cores`. Owned until `close()`."""

    def __init__(self, bundle: Path, device: str, cores: Sequence[int], key: bytes) -> None:
        """Start it; `address` waits until it listens."""
        command = [sys.executable, "-m", "stageline.runtime.hosts.child", str(bundle), device]
        self._process = subprocess.Popen(
            [*command, *map(str, cores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = f"{device} (process {self._process.pid})"
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(key.hex() + "\n")
            self._process.stdin.flush()

    def address(self) -> tuple[str, int]:
        """Where it listens. EngineError if it has ended before."""
        assert self._process.stdout is not None
        port = self._process.stdout.readline()
        if not port:
            raise EngineError(f"the process of a stage on {self.name} did not start: it {self.how_it_ended()}")
        return "127.0.0.1", int(port)

    def how_it_ended(self) -> str:
        """In words, such as `was killed by SIGSEGV`; waits a moment for that."""
        try:
            code = self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return "still runs"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def close(self) -> None:
        """End it at once, hung or not: it has nothing to keep. May be called again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

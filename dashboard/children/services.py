"""Services that the dashboard started: `stageline serve` as child processes, one per bundle, ended with it."""

import atexit
import json
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.dashboard.addresses import OPENER
from stageline.dashboard.children.command import reason, stageline
from stageline.models.errors import StagelineError

_START_S, _STOP_S = 120.0, 10.0
_BUSY = (429, 503)  # answers after which another try makes sense
_MESSAGE_BYTES = 4096
_TEXT = "The pipeline is cut into stages, and each stage runs on a device of its own while the others do the same."


@dataclass(frozen=True)
class Service:
    """A running child process and its address."""

    bundle: Path
    url: str
    process: "subprocess.Popen[str]"


class Services:
    """At most one service per bundle, for all browsers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Path, Service] = {}
        atexit.register(self.close)

    def running(self) -> list[Service]:
        """The services that have not ended."""
        with self._lock:
            self._running = {b: s for b, s in self._running.items() if s.process.poll() is None}
            return list(self._running.values())

    def start(self, bundle: Path) -> Service:
        """Serve `bundle`, or return its running service. StagelineError with its last line if it does not start."""
        with self._lock:
            known = self._running.get(bundle)
            if known is not None and known.process.poll() is None:
                return known
            service = _started(bundle)
            self._running[bundle] = service
            return service

    def stop(self, bundle: Path) -> None:
        """End the service of a bundle, if it has one."""
        with self._lock:
            service = self._running.pop(bundle, None)
        if service is not None:
            _end(service.process)

    def close(self) -> None:
        """End all services."""
        for service in self.running():
            self.stop(service.bundle)


def _started(bundle: Path) -> Service:
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            stageline("serve", str(bundle), "--port", "0"), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        watchdog = threading.Timer(_START_S, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if " at http" not in line:
            _end(process)
            stderr.seek(0)
            raise StagelineError(f"{bundle.name} could not be served: {reason(stderr.read(), 'no error message')}")
    return Service(bundle, line.split()[-1], process)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Traffic:
    """Requests to a service for `seconds`, from `streams` threads that each send one request after the other. It ends
    early where the service refuses them: `refusal` then says why, in a line."""

    def __init__(
        self, address: str, model: str, generates: bool, streams: int, seconds: float, api_key: str = ""
    ) -> None:
        self.until = time.monotonic() + seconds
        self.refusal: str | None = None
        path, body = (
            ("completions", {"prompt": _TEXT, "max_tokens": 32}) if generates else ("embeddings", {"input": _TEXT})
        )
        self._url, self._body = f"{address}/v1/{path}", {"model": model, **body}
        self._headers = {"content-type": "application/json"}
        self._headers |= {"authorization": f"Bearer {api_key}"} if api_key else {}
        for _ in range(streams):
            threading.Thread(target=self._send, name="load", daemon=True).start()

    def left_s(self) -> float:
        """Seconds until the end; 0 after it."""
        return max(0.0, self.until - time.monotonic())

    def stop(self) -> None:
        """Send no more requests."""
        self.until = 0.0

    def _send(self) -> None:
        data: Any = json.dumps(self._body).encode()
        while self.left_s():
            request = urllib.request.Request(self._url, data, self._headers)
            try:
                with OPENER.open(request, timeout=60) as answer:
                    answer.read()
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY:
                    self.refusal = f"the service refused the request with status {error.code}: {_said(error)}"
                    self.stop()
                time.sleep(0.5)
            except (OSError, ValueError):
                time.sleep(0.5)  # the page shows that the service is gone


def _said(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error document, or else the status in words."""
    try:
        return str(json.loads(error.read(_MESSAGE_BYTES))["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)

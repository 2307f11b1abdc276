"""Pages of a server in Debian's Chromium, for the dashboard's tests and for its benchmark: starting both, and READY."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
START_S = 40.0
# A page is drawn when its script has run, nothing of it is a skeleton, and each of its charts has its marks.
READY = """() => {
  const app = document.querySelector('[data-test-script-state]');
  const charts = [...document.querySelectorAll('[data-testid="stVegaLiteChart"]')];
  return app && app.getAttribute('data-test-script-state') === 'notRunning'
    && document.querySelector('[data-testid="stMain"] h1') !== null
    && document.querySelectorAll('[data-testid="stSkeleton"], [data-testid="stAppSkeleton"]').length === 0
    && charts.every(one => one.querySelector('canvas, svg.marks') !== null);
}"""


def launched(playwright: Any) -> Any:
    """Chromium under a started Playwright; the caller closes it."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))


@contextmanager
def served(command: Sequence[str], port_option: str = "--port") -> Iterator[tuple[str, int]]:
    """A command that serves pages, running: its address and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([*command, port_option, str(port)], stdout=said, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise RuntimeError(f"nothing listens at port {port}: {said.read()}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(20)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

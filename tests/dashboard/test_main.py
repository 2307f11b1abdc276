"""Opening the dashboard: what it refuses in one line, and the host names that it answers to."""

import socket
import sys
from pathlib import Path

import pytest
from chromium import served

pytest.importorskip("streamlit")
from stageline.dashboard.__main__ import main


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    monkeypatch.setattr("sys.argv", ["stageline.dashboard", *map(str, arguments)])
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_folders_that_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """B21: --bundles /nope said nothing."""
    gone = tmp_path / "nope"
    line = refusal(monkeypatch, capsys, "--bundles", gone)
    assert line == f"stageline: --bundles {gone}: there is no such folder; give a bundle or a folder of bundles"


def test_a_port_that_is_taken_is_refused_in_our_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """B21: Streamlit's own line was all that was said."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(monkeypatch, capsys, "--bundles", tmp_path, "--port", str(port))
    assert line.startswith(
        f"stageline: --port {port} of 127.0.0.1 cannot be used (Address already in use); give another"
    )


def handshake(url: str, host: str) -> int:
    """The status of the answer to a page of `host` that opens the connection over which pages are drawn."""
    port = int(url.rpartition(":")[2])
    request = (
        f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: http://{host}:{port}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request.encode())
        return int(connection.recv(64).split()[1])


def test_it_draws_pages_for_its_own_host_names_only(tmp_path: Path) -> None:
    """Else a page of another site whose name resolves to this machine could start benchmarks (DNS rebinding)."""
    options = ["--store", str(tmp_path / "bench.sqlite"), "--bundles", str(tmp_path), "--allow-host", "proxy.example"]
    with served([sys.executable, "-P", "-m", "stageline.dashboard", *options]) as (url, _):
        statuses = {host: handshake(url, host) for host in ("127.0.0.1", "localhost", "proxy.example", "evil.example")}
    assert statuses == {"127.0.0.1": 101, "localhost": 101, "proxy.example": 101, "evil.example": 403}

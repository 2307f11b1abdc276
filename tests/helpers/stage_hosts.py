"""Stage hosts for tests: in this process, in one of its own, and behind a link that can fall silent."""

import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.cluster.addresses import name_of, place_of
from stageline.runtime.cluster.handshake import read_key
from stageline.runtime.hosts.stage_host import StageHost


def write_key(folder: Path) -> Path:
    """A file with a key."""
    file = folder / "stage.key"
    file.write_text("0123456789abcdef" * 4)
    return file


@contextmanager
def hosted(bundle: Path, key_file: Path) -> Iterator[str]:
    """The address of a host of a bundle in this process."""
    host = StageHost(Bundle.open(bundle), ("127.0.0.1", 0), read_key(key_file), "cpu", 1)
    thread = threading.Thread(target=host.serve)
    thread.start()
    try:
        yield name_of(host.address)
    finally:
        host.close()
        thread.join()


@contextmanager
def host_process(bundle: Path, key_file: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a host, and its process, as `stageline stage` starts it."""
    command = [sys.executable, "-c", "from stageline.exporter.commands.cli import main; raise SystemExit(main())"]
    arguments = ["stage", str(bundle), "--key-file", str(key_file), "--listen", "127.0.0.1:0", "--threads", "1"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()


class Link:
    """A way to a host, at another address, until `close`. While it is `cut`, nothing comes through and nobody is told,
    as on a network that loses all packets."""

    def __init__(self, address: str) -> None:
        self._target = place_of(address)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = name_of(self._listener.getsockname())
        self.cut = threading.Event()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> None:
        try:
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()
        except OSError:
            pass

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while True:
                select.select([source], [], [])
                data = source.recv(65536)
                if self.cut.is_set():
                    continue
                target.sendall(data)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
        except (OSError, ValueError):
            pass

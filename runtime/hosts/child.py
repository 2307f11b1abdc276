"""A child process that hosts stages for its parent alone; `cluster.children` starts it."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from stageline.runtime.bundle.folder import Bundle, read_manifest, tensors_of
from stageline.runtime.devices.cpu import pin
from stageline.runtime.hosts.stage_host import StageHost


def main(bundle: Path, device: str, cores: Sequence[int]) -> None:
    """Host stages until standard input ends, on `cores` (none: any)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints is for people, and nobody reads the pipe after the port
    key = bytes.fromhex(sys.stdin.readline())
    if cores:
        pin(cores)
    manifest = read_manifest(bundle)  # the parent has compared the files' digests
    host = StageHost(Bundle(bundle, manifest, tensors_of(bundle, manifest)), ("127.0.0.1", 0), key, device, None)

    def wait_for_end() -> None:
        sys.stdin.read()
        os._exit(0)  # at once: whatever an engine is doing, nobody waits for it

    threading.Thread(target=wait_for_end, daemon=True).start()
    print(host.address[1], file=told, flush=True)
    host.serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(core) for core in sys.argv[3:]])

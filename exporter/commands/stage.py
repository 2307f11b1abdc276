"""The command `stageline stage`."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from stageline.exporter.commands import common
from stageline.runtime.cluster.addresses import is_loopback, name_of, place_of


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("stage")(stage_command)


def stage_command(
    bundle: common.BundleArgument,
    key_file: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            envvar="STAGELINE_KEY_FILE",
            help="A file with at least 32 random bytes, the same as the pipeline's: openssl rand -hex 32.",
        ),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The address to listen on; port 0: any free one.")
    ] = "127.0.0.1:7070",
    device: Annotated[
        str, typer.Option(metavar="D", help="The device of the stages that are asked for: cpu or cuda:N.")
    ] = "cpu",
    threads: common.ThreadsOption = None,
) -> None:
    """Run stages of a bundle for a pipeline in another process or on another machine.

    The pipeline is opened there with the same bundle and key, and a device tcp://HOST:PORT for each stage on a host.
    Frames are signed, not encrypted: listen on a private network. A later pipeline takes the host over from an earlier
    one.

    Example: stageline stage smollm2.bundle --listen 10.0.0.5:7070 --key-file stage.key
    """
    from stageline.runtime.bundle.folder import Bundle
    from stageline.runtime.cluster.handshake import read_key
    from stageline.runtime.hosts.stage_host import StageHost

    place, key = place_of(listen), read_key(key_file)
    log = logging.getLogger("stageline.cluster")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("stageline: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    host = StageHost(Bundle.open(bundle), place, key, device, threads)
    if not is_loopback(place[0]):
        print(f"stageline: {listen}: frames are signed, not encrypted; use a private network", file=sys.stderr)
    signal.signal(signal.SIGTERM, _end)
    print(f"stages of {bundle} on {host.device} at {name_of(host.address)}", flush=True)
    try:
        host.serve()
    finally:
        host.close()


def _end(number: int, frame: object) -> NoReturn:
    raise typer.Exit

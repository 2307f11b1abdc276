"""Opens the dashboard: `python -m stageline.dashboard`, run by `stageline dashboard`, becomes Streamlit itself."""

import argparse
import os
import socket
import sys
from argparse import Namespace
from pathlib import Path

from stageline.dashboard.settings import add_options, default_places
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store

_FIRST_PORT, _PORTS = 8501, 50
_EVERYWHERE = ("0.0.0.0", "::")  # addresses that mean all interfaces
_HERE = ("localhost", "127.0.0.1", "::1")


def main() -> int:
    """Replace this process by Streamlit. It listens on this machine only, unless `--host` says otherwise.

    Returns the exit status if it does not come to that.
    """
    parser = argparse.ArgumentParser(prog="stageline dashboard")
    add_options(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--allow-host", action="append", default=[])
    try:
        given = parser.parse_args()
        _check_bundles(given.bundles)
        port = _free_port(given.host, given.port)
    except StagelineError as error:
        print(f"stageline: {error}", file=sys.stderr)
        return 1
    print(_banner(given, port), flush=True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "streamlit", "run", *_arguments(given, port)])


def _arguments(given: Namespace, port: int) -> list[str]:
    script = Path(__file__).with_name("app.py")
    flags = ["--server.address", given.host, "--server.port", str(port)]
    flags += ["--browser.gatherUsageStats", "false", "--logger.hideWelcomeMessage", "true"]
    # Else a page of another site could have its name resolve to this machine, and start benchmarks (DNS rebinding).
    flags += [word for name in _own_names(given) for word in ("--server.allowedHosts", name)]
    own = ["--store", str(given.store)] if given.store else []
    own += [word for folder in given.bundles for word in ("--bundles", str(folder))]
    own += [word for address in given.service for word in ("--service", address)]
    own += ["--read-only"] if given.read_only else []
    return [str(script), *flags, "--", *own]


def _own_names(given: Namespace) -> list[str]:
    """The host names that requests may be sent to."""
    names = [*_HERE, *given.allow_host]
    if given.host not in _EVERYWHERE:
        return list(dict.fromkeys([*names, given.host]))
    name = socket.gethostname()
    try:
        found = [str(one[4][0]) for one in socket.getaddrinfo(name, None)]
    except OSError:
        found = []
    return list(dict.fromkeys([*names, name, *found]))


def _check_bundles(folders: list[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise StagelineError(f"--bundles {folder}: there is no such folder; give a bundle or a folder of bundles")


def _free_port(host: str, wanted: int | None) -> int:
    """The wanted port, or the first free one from 8501 on. StagelineError if it is taken, or `host` is not ours."""
    ports = [wanted] if wanted else range(_FIRST_PORT, _FIRST_PORT + _PORTS)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = error
                continue
            return port
    if wanted is None:
        raise StagelineError(f"no port from {_FIRST_PORT} to {ports[-1]} of {host} can be used ({reason.strerror})")
    raise StagelineError(
        f"--port {wanted} of {host} cannot be used ({reason.strerror}); give another, or none for the next free one"
    )


def _banner(given: Namespace, port: int) -> str:
    host = "localhost" if given.host in _EVERYWHERE else f"[{given.host}]" if ":" in given.host else given.host
    places = given.bundles or default_places(Path.cwd())
    lines = [
        f"Stageline's dashboard opens at http://{host}:{port} (Ctrl-C ends it)",
        f"  runs     {Store(given.store).path}",
        f"  bundles  {', '.join(map(str, places))}",
    ]
    lines += [f"  services {', '.join(given.service)}"] if given.service else []
    lines += ["  read-only: pages start and stop nothing"] if given.read_only else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

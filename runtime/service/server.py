"""The service as a process: uvicorn with a shutdown that lets running requests finish."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.connections import HEAD_S, ConnectionWatch, GuardedSocket

_HEAD_BYTES = 64 * 1024  # of a request's head; h11 bounds it, other parsers do not
_ERRORS_S = 5  # for the errors of requests that were cut off to reach their clients
_FLUSH_S = 1.0  # for the errors of a broken pipeline to do so


def bound_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0: any free one. StagelineError if it cannot be bound."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise StagelineError(f"cannot listen on {host} port {port} ({error.strerror}); choose another") from error
    return bound


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Yield a socket at a path, which only this user may use, and remove it in the end. It listens already, so that who
    comes meanwhile sees that it is taken. One that nobody listens to any more is replaced.

    StagelineError if somebody does, if something else lies there, or if it cannot be made.
    """
    with socket.socket(socket.AF_UNIX) as bound:
        try:
            if path.exists() or path.is_symlink():
                _remove_stale(path)
            before = os.umask(0o177)
            try:
                bound.bind(str(path))
            finally:
                os.umask(before)
        except OSError as error:
            raise StagelineError(f"cannot listen on {path} ({error.strerror or error}); choose another") from error
        bound.listen(1)
        try:
            yield bound
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise StagelineError(f"{path} is there, and no socket; choose another path")
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass
    raise StagelineError(f"another process listens on {path}; end it, or choose another path")


def check_certificate(certificate: Path, key: Path | None) -> None:
    """StagelineError unless these PEM files are a certificate and its key (None: in the same file)."""
    files = f"--tls-cert {certificate}" + (f" with --tls-key {key}" if key is not None else "")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=lambda: b"")  # or OpenSSL would ask for it
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, ssl.SSLError):
            said = error.reason.replace("_", " ").lower() if error.reason else "not in PEM"
        advice = "give a certificate and its key, in PEM, not encrypted"
        raise StagelineError(f"cannot use {files} ({said}); {advice}") from error


class DrainingServer(uvicorn.Server):
    """Serves until a signal, then accepts no new requests and gives running ones `drain_s` seconds to finish.

    After that it closes the pipelines, which it borrows, and unfinished requests get an error. It calls `ready` once
    requests can come, and `failed`, with the reason, once a pipeline is broken and the errors have reached the clients.
    """

    def __init__(
        self,
        app: FastAPI,
        pipelines: Sequence[Pipeline],
        drain_s: float,
        ready: Callable[[], None],
        certificate: Path | None = None,
        key: Path | None = None,
        failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """With a `certificate` it serves over TLS."""
        shutdown_s = math.ceil(drain_s) + _ERRORS_S
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                log_config=None,  # uvicorn's wants stdout, which may be closed
                timeout_graceful_shutdown=shutdown_s,
                h11_max_incomplete_event_size=_HEAD_BYTES,
                http="h11",
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._watch = ConnectionWatch(self.server_state.connections)
        self._watching: asyncio.Task[None] | None = None
        self._pipelines, self._drain_s, self._ready, self._failed = pipelines, drain_s, ready, failed
        self._broken_since: float | None = None

    def run_until_signal(self, listening: socket.socket) -> None:
        """Serve on this socket until SIGTERM, SIGINT or SIGHUP (the terminal was closed, and nohup was not used), then
        close it. A second SIGINT does not wait."""
        # uvicorn raises the signal again when it is done, but it has been handled by then.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            self.run([listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first one lets requests finish, a second SIGINT cuts them off."""
        if self.should_exit and sig == signal.SIGINT:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off would show its traceback
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report that the service is ready."""
        if self.config.ssl_certfile is not None:
            _bound_handshakes(asyncio.get_running_loop())
        await super().startup([GuardedSocket(bound, self._watch) for bound in sockets or ()])
        self._watching = asyncio.create_task(self._watch.run())
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Look for broken pipelines; whether to end."""
        reason = next((pipeline.broken for pipeline in self._pipelines if pipeline.broken), None)
        now = time.monotonic()
        self._broken_since = None if reason is None else self._broken_since or now
        if reason is not None and now - (self._broken_since or now) > _FLUSH_S:
            self._failed(reason)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish, for `drain_s` seconds."""
        closing = asyncio.create_task(self._close_after_drain())
        await super().shutdown(sockets)
        closing.cancel()
        if self._watching is not None:
            self._watching.cancel()

    async def _close_after_drain(self) -> None:
        await asyncio.sleep(self._drain_s)
        for pipeline in self._pipelines:
            # No thread that the event loop would wait for: a stage that never ends, such as an endless loop in a graph,
            # holds up its closing for ever.
            threading.Thread(target=pipeline.close, daemon=True).start()


def _bound_handshakes(loop: asyncio.AbstractEventLoop) -> None:
    """Let a TLS handshake take no longer than the head of a request: uvicorn leaves it to asyncio, which waits a
    minute. The watch of the connections does not see them before."""
    with contextlib.suppress(AttributeError):  # uvloop's is not to be changed
        loop.create_server = partial(loop.create_server, ssl_handshake_timeout=HEAD_S)  # type: ignore[method-assign]

"""The service as a process: uvicorn with a shutdown that lets running requests finish."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI
from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.connections import ConnectionWatch

_HEAD_BYTES = 64 * 1024  # of a request's head; h11 bounds it, other parsers do not
_ERRORS_S = 5  # for the errors of requests that were cut off to reach their clients


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


class DrainingServer(uvicorn.Server):
    """Serves until a signal, then accepts no new requests and gives running ones `drain_s` seconds to finish.

    After that it closes the pipelines, which it borrows, and unfinished requests get an error. It calls `ready` once
    requests can come.
    """

    def __init__(self, app: FastAPI, pipelines: Sequence[Pipeline], drain_s: float, ready: Callable[[], None]) -> None:
        shutdown_s = math.ceil(drain_s) + _ERRORS_S
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=shutdown_s,
                h11_max_incomplete_event_size=_HEAD_BYTES,
                http="h11",
            )
        )
        self._watch: asyncio.Task[None] | None = None
        self._pipelines, self._drain_s, self._ready = pipelines, drain_s, ready

    def run_until_signal(self, listening: socket.socket) -> None:
        """Serve on this socket until SIGTERM or SIGINT, then close it. A second SIGINT does not wait."""
        # uvicorn raises the signal again when it is done, but it has been handled by then.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run([listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report that the service is ready."""
        await super().startup(sockets)
        self._watch = asyncio.create_task(ConnectionWatch(self.server_state.connections).run())
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish, for `drain_s` seconds."""
        closing = asyncio.create_task(self._close_after_drain())
        await super().shutdown(sockets)
        closing.cancel()
        if self._watch is not None:
            self._watch.cancel()

    async def _close_after_drain(self) -> None:
        await asyncio.sleep(self._drain_s)
        for pipeline in self._pipelines:
            await asyncio.to_thread(pipeline.close)

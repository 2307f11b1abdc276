"""The service as a process: uvicorn, and a shutdown that lets running requests finish."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI
from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline

_LAST_WORDS_S = 5  # for the errors of requests that were cut off to reach their clients


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket on which nothing listens yet; port 0: any that is free. StagelineError where it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise StagelineError(f"cannot listen on {host} port {port} ({error.strerror}); choose others") from error
    return bound


class DrainingServer(uvicorn.Server):
    """Serves until it is told to end, then accepts no more and gives what runs `drain_s` seconds to finish.

    What is still unfinished then gets an error, since the pipelines, borrowed until then, are closed. `ready` is called
    when the first request can come.
    """

    def __init__(self, app: FastAPI, pipelines: Sequence[Pipeline], drain_s: float, ready: Callable[[], None]) -> None:
        most_s = math.ceil(drain_s) + _LAST_WORDS_S
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=most_s))
        self._pipelines, self._drain_s, self._ready = pipelines, drain_s, ready

    def run_until_signal(self, listening: socket.socket) -> None:
        """Serve on this socket, which is closed at the end, until SIGTERM or SIGINT; a second SIGINT does not wait."""
        # uvicorn raises the signal again when it is done: it has been answered then.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run([listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        closing = asyncio.create_task(self._close_after_drain())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_after_drain(self) -> None:
        await asyncio.sleep(self._drain_s)
        for pipeline in self._pipelines:
            await asyncio.to_thread(pipeline.close)

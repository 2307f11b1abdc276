"""Connections that ask nothing: closed after a while, and the longest silent ones at once where files run short.

uvicorn waits for ever for the first request of a connection, and for the end of a request's head. Whoever opens
thousands of them takes all file descriptors, and nobody else gets in.
"""

import asyncio
import heapq
import resource
import socket
import time
from typing import Any

HEAD_S = 20.0  # from the beginning of a connection, or the end of its last answer, to a whole head of a request
_EVERY_S = 0.25
_MOST_SPARE = 64  # file descriptors that connections leave to all else, or an eighth of all
_GO_AT_ONCE = 16  # where they run short, one in so many silent connections goes


class ConnectionWatch:
    """Watches the connections of a uvicorn server, which it borrows."""

    def __init__(self, connections: set[Any]) -> None:
        """`connections`: uvicorn's protocols, as it keeps them."""
        self._connections = connections
        self._silent_since: dict[Any, float] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Close the connections that have been silent for HEAD_S."""
        silent = [one for one in self._connections if not _asks(one)]
        self._silent_since = {one: self._silent_since.get(one, now) for one in silent}
        for one, since in self._silent_since.items():
            if now - since > HEAD_S:
                one.transport.close()

    def make_room(self, now: float) -> None:
        """Close the longest silent connections."""
        self.look(now)
        silent = [one for one in self._silent_since if not one.transport.is_closing()]
        many = -(-len(silent) // _GO_AT_ONCE)
        for one in heapq.nsmallest(many, silent, key=self._silent_since.__getitem__):
            one.transport.close()


class GuardedSocket(socket.socket):
    """A listening socket that lets connections take no more file descriptors than this process can spare."""

    def __init__(self, bound: socket.socket, watch: ConnectionWatch) -> None:
        """`bound` is taken over."""
        super().__init__(bound.family, bound.type, bound.proto, fileno=bound.detach())
        self._watch = watch

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. ConnectionAbortedError where there is no file to spare: it is closed, and asyncio comes
        back for the others."""
        connection, address = super().accept()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = min(_MOST_SPARE, files // 8)
        # A new file has the lowest number that is free: all below are open.
        if connection.fileno() >= files - 2 * spare:
            self._watch.make_room(time.monotonic())
        if connection.fileno() >= files - spare:
            connection.close()
            raise ConnectionAbortedError
        return connection, address


def raise_file_limit() -> None:
    """Let this process open as many files as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _asks(connection: Any) -> bool:
    """Whether a request of this connection is being answered."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete

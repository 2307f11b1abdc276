"""Connections that ask nothing: closed after a while, and the oldest of them first where there are too many.

uvicorn waits for ever for the first request of a connection, and for the end of a request's head. Whoever opens
thousands of them takes all file descriptors, and nobody else gets in.
"""

import asyncio
import resource
import time
from typing import Any

HEAD_S = 20.0  # from the beginning of a connection, or the end of its last answer, to a whole head of a request
_SPARE_FILES = 128  # file descriptors for all else
_EVERY_S = 0.25


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
            self.look(time.monotonic(), most_connections())

    def look(self, now: float, most: int) -> None:
        """Close the connections that have been silent for HEAD_S, and of more than `most` the longest silent."""
        silent = [one for one in self._connections if not _asks(one)]
        self._silent_since = {one: self._silent_since.get(one, now) for one in silent}
        too_many = max(0, len(self._connections) - most)
        for place, (one, since) in enumerate(sorted(self._silent_since.items(), key=lambda item: item[1])):
            if place < too_many or now - since > HEAD_S:
                one.transport.close()


def most_connections() -> int:
    """How many connections leave enough file descriptors for all else."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, files - _SPARE_FILES)


def raise_file_limit() -> None:
    """Let this process open as many files as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _asks(connection: Any) -> bool:
    """Whether a request of this connection is being answered."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete

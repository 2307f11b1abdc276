"""Whose turn it is to measure on this machine: one thing at a time, since two would disturb each other."""

import threading
from collections.abc import Callable

from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store

_NEWEST = 50  # runs searched for a running one


class Turn:
    """Shared by all that a dashboard measures with. Whoever begins holds `lock` from `check_free` to its start."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._children: list[Callable[[], str | None]] = []

    def ask(self, child: Callable[[], str | None]) -> None:
        """From now on ask `child`, too: it says in a few words what its process measures now, or None."""
        self._children.append(child)

    def taken(self, store: Store) -> str | None:
        """What is being measured, by this dashboard or, as far as the store shows it, by anyone; None: nothing."""
        with self.lock:
            said = next(filter(None, (child() for child in self._children)), None)
            return said or next((f"run {run_id} is running" for run_id in running(store)), None)

    def check_free(self, store: Store) -> None:
        """StagelineError if anything is being measured."""
        taken = self.taken(store)
        if taken:
            raise StagelineError(f"{taken}; wait for its end or cancel it: one at a time")


def running(store: Store) -> list[str]:
    """The ids of the store's running runs, newest first, whoever started them."""
    return [line.id for line in store.runs(_NEWEST) if line.status == "running"]

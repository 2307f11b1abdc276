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
        self._failed: list[Callable[[str], str | None]] = []

    def ask(self, child: Callable[[], str | None]) -> None:
        """From now on ask `child`, too: it says in a few words what its process measures now, or None."""
        self._children.append(child)

    def believe(self, failed: Callable[[str], str | None]) -> None:
        """From now on a run does not run any more, whatever the store says, if `failed` gives a reason for its id."""
        self._failed.append(failed)

    def runs(self, store: Store) -> list[str]:
        """The ids of the store's running runs, newest first, whoever started them, without those that are known to have
        died."""
        return [one for one in running(store) if not any(failed(one) for failed in self._failed)]

    def taken(self, store: Store) -> str | None:
        """What is being measured, by this dashboard or, as far as the store shows it, by anyone; None: nothing."""
        with self.lock:
            said = next(filter(None, (child() for child in self._children)), None)
            return said or next((f"run {run_id} is running" for run_id in self.runs(store)), None)

    def check_free(self, store: Store) -> None:
        """StagelineError if anything is being measured."""
        taken = self.taken(store)
        if taken:
            raise StagelineError(f"{taken}; wait for its end or cancel it: one at a time")


def running(store: Store) -> list[str]:
    """The ids of the runs that the store believes to be running, newest first."""
    return [line.id for line in store.runs(_NEWEST) if line.status == "running"]

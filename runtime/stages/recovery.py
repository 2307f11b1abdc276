"""Opens stages again when one of them is lost, on a thread of its own.

watching ──a stage is lost──> reopening ──> watching     what was under way begins again on the new stages
                                 │  ^──┘ not there yet: again, for `RECOVERY_S`
                                 └──> given up           refused, or too late: what waits fails with the reason
"""

import logging
import threading
from collections.abc import Callable
from time import monotonic

from stageline.models.errors import RequestError, StagelineError, StageLostError

RECOVERY_S = 120.0
_LOOK_S, _RETRY_S = 0.05, 1.0
log = logging.getLogger("stageline.cluster")


class Recovery:
    """Watches until `stop`. `lost`: why a stage is, if one is; `reopen` opens all again, or raises; `give_up` fails
    what waits."""

    def __init__(
        self, lost: Callable[[], str | None], reopen: Callable[[], object], give_up: Callable[[StageLostError], None]
    ) -> None:
        self.reason: str | None = None
        """Why nothing is computed for the moment, while stages are opened again."""
        self.failed: str | None = None
        """Why nothing will be computed any more."""
        self.recovered = 0
        """How often."""
        self._lost, self._reopen, self._give_up = lost, reopen, give_up
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="recovery", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Open nothing any more."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread; a running attempt ends first."""
        self._thread.join()

    def _watch(self) -> None:
        while self.failed is None and not self._stop.wait(_LOOK_S):
            why = self._lost()
            if why is not None:
                self.reason = why
                self._recover(why)
                self.reason = None

    def _recover(self, why: str) -> None:
        log.warning("%s; opening it again", why)
        began = monotonic()
        until = began + RECOVERY_S
        while not self._stop.is_set():
            try:
                self._reopen()
            except Exception as error:
                final = isinstance(error, RequestError) or not isinstance(error, StagelineError)
                if self._stop.is_set():
                    return
                if final or monotonic() > until:
                    self.failed = f"{why}, and cannot be opened again: {error}"
                    self._give_up(StageLostError(self.failed))
                    log.log(logging.ERROR, "%s", self.failed, exc_info=not isinstance(error, StagelineError))
                    return
                self._stop.wait(_RETRY_S)
            else:
                self.recovered += 1
                log.warning("all stages are open again after %.1f s", monotonic() - began)
                return

"""How long each stage of a GPU has computed. Time in which several do counts for each in equal parts.

So the stages' times add up to the time in which the GPU computed, and a stage is not slower for what runs beside it.
"""

import math
import threading
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from stageline.runtime.devices.cuda.events import Event


@dataclass(eq=False)
class Meter:
    """What one stage has computed, in seconds, and its runs that are not counted yet, in their order."""

    busy_s: float = 0.0
    runs: deque[tuple[Event, Event]] = field(default_factory=deque)


@dataclass(frozen=True)
class _Part:
    """A stage computed from `began_s` to `ended_s` of the clock."""

    meter: Meter
    began_s: float
    ended_s: float


class Clock:
    """The clock of one GPU. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest, and the meters
        self._meters: set[Meter] = set()
        self._parts: list[_Part] = []  # of ended runs, not counted yet
        self._settled_s = -math.inf  # everything before is counted
        # Times are relative to an event of late, since the driver gives differences in float32.
        self._origin: tuple[Event, float] | None = None

    def new_meter(self) -> Meter:
        """A meter for a stage, until it is removed."""
        meter = Meter()
        with self._lock:
            self._meters.add(meter)
        return meter

    def remove(self, meter: Meter) -> None:
        """The stage runs no more. Its time stays what it is."""
        with self._lock:
            self._meters.discard(meter)

    def computed(self, meter: Meter, began: Event, ended: Event) -> None:
        """Count a run of a stage, once it has ended. CudaError if the device failed."""
        with self._lock:
            meter.runs.append((began, ended))
            self._count()

    def count(self) -> None:
        """Count what has ended by now. CudaError if the device failed."""
        with self._lock:
            self._count()

    def _count(self) -> None:
        last: Event | None = None
        for meter in self._meters:
            while meter.runs and meter.runs[0][1].done():
                began, last = meter.runs.popleft()
                self._parts.append(_Part(meter, self._at(began), self._at(last)))
        if last is None:
            return
        # What is running now may go on for as long as anything that has ended; what has not begun, began after that.
        running = [meter.runs[0][0] for meter in self._meters if meter.runs and meter.runs[0][0].done()]
        until_s = min((self._at(began) for began in running), default=math.inf)
        self._origin = last, self._at(last)
        self._settle(until_s)

    def _settle(self, until_s: float) -> None:
        """Give each stage its share of the time until then."""
        parts = [(part.meter, max(part.began_s, self._settled_s), min(part.ended_s, until_s)) for part in self._parts]
        bounds = sorted({at_s for _, *ends in parts for at_s in ends})
        for began_s, ended_s in pairwise(bounds):
            at_work = [meter for meter, first, last in parts if first <= began_s and ended_s <= last]
            for meter in at_work:
                meter.busy_s += (ended_s - began_s) / len(at_work)
        self._settled_s = max([self._settled_s, *(last for _, _, last in parts)])
        self._parts = [part for part in self._parts if part.ended_s > until_s]

    def _at(self, event: Event) -> float:
        if self._origin is None:
            self._origin = event, 0.0
        origin, origin_s = self._origin
        return origin_s + event.seconds_since(origin)

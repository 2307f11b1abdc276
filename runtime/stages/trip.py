"""One walk along a route: what a micro-batch of a batch and a step of generation have in common.

    start ──> stage's inbox ──> visit, run ──> next stage's inbox ──> visit, run ──> landing ──> landed(outputs)
                                   └─ raises: landed(error), after the other stages if `visits_all`

A stage's worker takes a trip from its inbox and puts it into the next stage's: it alone owns the trip in between.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import ClassVar

from stageline.models.errors import EngineError
from stageline.runtime.engines import Array, Engine, Value
from stageline.runtime.stages.lanes import Lane, Lanes
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.stages.route import Hop


@dataclass(eq=False)
class Trip(ABC):
    """`values` on their way along `hops` through `lanes`; what they are is for the subclass to say."""

    visits_all: ClassVar[bool] = False
    """Whether it visits the remaining stages after an error, though their engines do not run."""

    lanes: Lanes
    hops: Sequence[Hop]
    values: Mapping[str, Value]
    number: int
    """Counts up in the order in which trips start."""
    error: EngineError | None = field(default=None, init=False)
    busy_s: float = field(default=0.0, init=False)
    """How long engines were busy with it on this thread's side; on GPUs they go on after that."""
    _place: int = field(default=0, init=False)  # in `hops`

    def start(self) -> None:
        """Put it into the inbox of its first stage."""
        self.lanes.put(self.hops[self._place].stage, self._arrive)

    def _arrive(self, lane: Lane, engine: Engine) -> None:
        hop = self.hops[self._place]
        try:
            self.visit(lane, engine)
            if self.error is None:
                began = perf_counter()
                outputs = self.run(engine, hop.fetch)
                self.busy_s += lane.ran(began, self)
                self.values = {n: value for n, value in {**self.values, **outputs}.items() if n in hop.keep}
        except BaseException as error:  # whatever an engine raises, the worker lives on
            self._fail(lane, error)
        self._place += 1
        if self._place < len(self.hops) and (self.error is None or self.visits_all):
            self.start()
            return
        values, self.values = self.values, {}
        try:
            lane.lander.land(values, partial(self._land, lane))
        except BaseException as error:
            self._land(lane, error)

    def _land(self, lane: Lane, outputs: dict[str, Array] | BaseException) -> None:
        if isinstance(outputs, BaseException):
            self._fail(lane, outputs)
            outputs = {}
        self.landed(lane, self.error or outputs)

    def _fail(self, lane: Lane, error: BaseException) -> None:
        self.values = {}
        self.error = self.error or self.failure(lane, error)

    @abstractmethod
    def visit(self, lane: Lane, engine: Engine) -> None:
        """Do what comes before the engine runs. What it raises ends the trip."""

    @abstractmethod
    def run(self, engine: Engine, fetch: Sequence[str]) -> Mapping[str, Value]:
        """Compute the values named in `fetch` from `values`."""

    @abstractmethod
    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        """See `Recordable.traced`."""

    @abstractmethod
    def failure(self, lane: Lane, error: BaseException) -> EngineError:
        """The error for whoever waits, of what was raised at a stage."""

    @abstractmethod
    def landed(self, lane: Lane, outcome: dict[str, Array] | EngineError) -> None:
        """The outputs are in host memory, or never will be. On the last stage's thread; it does not raise."""

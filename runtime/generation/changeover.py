"""A change of lanes that the driver of generation makes between two steps, and the caches' way to the new ones."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from stageline.runtime.engines import Engine, Value
from stageline.runtime.generation.scheduler import Continuation
from stageline.runtime.stages.lanes import Lanes
from stageline.runtime.stages.route import Hop


@dataclass(eq=False, slots=True)
class Changeover:
    """Go on with `lanes` and the way `hops` through them. `pause_s` is the time from asking until steps go on.

    With `keep_caches` no step is issued from now on, and those under way are waited for: no continuation notices.
    Without, requests that have begun are finished first, and later ones are `held` back until then.
    """

    lanes: Lanes
    hops: Sequence[Hop]
    keep_caches: bool
    asked_at: float = field(default_factory=perf_counter)
    held: list[Continuation] = field(default_factory=list)
    pause_s: "Future[float]" = field(default_factory=Future)


def move_caches(old: Lanes, new: Lanes) -> None:
    """Hand the caches of the old lanes' engines, on which no step is under way, to those of the new ones.

    Raises what an engine raises; then the old engines have their caches back.
    """
    given = [old.ask(stage, _given) for stage in range(len(old))]
    try:
        caches = {name: cache for answer in given for name, cache in answer.result().items()}
        for taken in [new.ask(stage, partial(_take, caches)) for stage in range(len(new))]:
            taken.result()
    except BaseException:
        for stage, answer in enumerate(given):
            if answer.exception() is None:
                old.ask(stage, partial(_take, answer.result())).result()
        raise


def _given(engine: Engine) -> Mapping[str, Value]:
    return engine.give_caches()


def _take(caches: Mapping[str, Value], engine: Engine) -> None:
    engine.take_caches(caches)

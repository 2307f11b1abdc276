"""Work for a pipeline, as planner, builder and benchmark describe it: shapes, workload, and arrival times."""

import itertools
import random
from dataclasses import dataclass

from stageline.runtime.bundle.manifest import BATCH, LENGTH, PICKS


@dataclass(frozen=True)
class Shape:
    """A micro-batch: its rows, new tokens per row, tokens per row already in the cache (`past`), and positions per row
    whose logits are requested (`picks`; None: all new tokens without a past, else one)."""

    batch: int
    length: int
    past: int = 0
    picks: int | None = None

    def sizes(self) -> dict[str, int]:
        """Sizes of the free dimensions by name."""
        picks = self.picks if self.picks is not None else 1 if self.past else self.length
        return {BATCH: self.batch, LENGTH: self.length, PICKS: picks}


@dataclass(frozen=True)
class Workload:
    """What the pipeline will run. With caches: `slots` rows of `capacity` tokens, decoded in one group per stage, with
    half of them in the cache on average. Without: micro-batches of `micro_batch` rows of `length` tokens."""

    micro_batch: int = 8
    length: int = 128
    slots: int = 8
    capacity: int = 2048

    def shape(self, cached: bool, stages: int | None) -> Shape:
        """The micro-batch that the plan is made for."""
        if not cached:
            return Shape(self.micro_batch, self.length)
        return Shape(-(-self.slots // (stages or 1)), 1, max(1, self.capacity // 2), 1)


def poisson(rate_per_s: float, count: int, seed: int) -> list[float]:
    """`count` arrival times of a Poisson process. Another rate with the same seed stretches the same pattern."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(1.0) / rate_per_s for _ in range(count)))

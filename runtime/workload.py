"""What a planner, a builder or a benchmark is asked for: shapes, load, and arrival times."""

import itertools
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows, new tokens in each, tokens that each has in the cache before, places whose logits are wanted
    (None: all new tokens where nothing is past, else one)."""

    batch: int
    length: int
    past: int = 0
    picks: int | None = None

    def sizes(self) -> dict[str, int]:
        """The free dimensions by name."""
        picks = self.picks if self.picks is not None else 1 if self.past else self.length
        return {"batch": self.batch, "length": self.length, "picks": picks}


@dataclass(frozen=True)
class Workload:
    """What the pipeline is to run. With caches: `slots` rows of `capacity` tokens, half of them past on average,
    decoded in one group per stage. Without: micro-batches of `micro_batch` rows of `length` tokens."""

    micro_batch: int = 8
    length: int = 128
    slots: int = 8
    capacity: int = 2048

    def shape(self, cached: bool, stages: int | None) -> Shape:
        """The micro-batch that decides."""
        if not cached:
            return Shape(self.micro_batch, self.length)
        return Shape(-(-self.slots // (stages or 1)), 1, max(1, self.capacity // 2), 1)


def poisson(rate_per_s: float, count: int, seed: int) -> list[float]:
    """`count` arrival times of a Poisson process. Another rate with the same seed stretches the same pattern."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(1.0) / rate_per_s for _ in range(count)))

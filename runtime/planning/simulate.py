"""A pipeline as discrete events: what it gives under a load, before it is built.

Stages and links are servers with a queue each, first come, first served; a micro-batch goes through them in order.
Generation is driven by the runtime's own scheduler (`stageline.runtime.generation.scheduler`): the simulated stages run
the steps that it issues. The same seed gives the same run.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from stageline.models.errors import StagelineError
from stageline.runtime.generation.scheduler import Continuation, Scheduler, Step, chosen_rows
from stageline.runtime.planning.cost import Shape

_MOST_LOAD = 0.95  # of what a pipeline does when all requests come at once
Seconds = Callable[[Shape], float]
"""What a micro-batch takes."""


@dataclass(frozen=True)
class SimulatedStage:
    """A stage: what a micro-batch takes on it, and what it takes to get there over `link` (stages that name one link
    share it). Stages on one `processor` share that. `slowdown` multiplies its times; `jitter` is the standard deviation
    of the logarithm of a random factor on each."""

    compute: Seconds
    processor: int
    copy: Seconds | None = None
    link: str = ""
    slowdown: float = 1.0
    jitter: float = 0.0
    busy_w: float = 0.0
    idle_w: float = 0.0
    price_per_h: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A pipeline to simulate. Without `overlap` a stage waits for its own copies. `host_s` passes between the end of a
    step in the last stage and what follows from it."""

    stages: tuple[SimulatedStage, ...]
    overlap: bool = True
    host_s: float = 0.0


@dataclass(frozen=True)
class BatchRequest:
    """Rows of a length that come at a time."""

    arrival_s: float
    rows: int
    length: int


@dataclass(frozen=True)
class TextRequest:
    """A prompt of so many tokens, to be continued by so many."""

    arrival_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of these values; zeros where there are none."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(float(np.mean(values)), *map(float, np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class Report:
    """What a run gave, from its first arrival to its last result.

    `ttft` is the time to the first token, `tpot` the time for each one after it (both of generation only), `wait` what
    a micro-batch queued before the first stage. `bubble` is the share of the stages' time in which they did nothing.
    """

    requests: int
    duration_s: float
    requests_per_s: float
    tokens_per_s: float
    latency: Spread
    ttft: Spread
    tpot: Spread
    wait: Spread
    utilisation: tuple[float, ...]
    bubble: float
    in_system: float
    energy_j: float
    cost: float


def poisson(rate_per_s: float, count: int, seed: int) -> list[float]:
    """`count` arrival times of a Poisson process. Another rate with the same seed stretches the same pattern."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(1.0) / rate_per_s for _ in range(count)))


def simulate_batches(setting: Setting, requests: Sequence[BatchRequest], micro_rows: int, seed: int = 0) -> Report:
    """Requests cut into micro-batches of at most `micro_rows` rows, each done when all of its micro-batches are."""
    run = _Run(setting, seed)

    def arrive(request: BatchRequest) -> None:
        run.enter(request.arrival_s)
        count = -(-request.rows // micro_rows)
        left = [count]

        def leave() -> None:
            left[0] -= 1
            if not left[0]:
                run.leave(request.arrival_s, request.rows * request.length)

        for number in range(count):
            rows = request.rows * (number + 1) // count - request.rows * number // count
            run.send(Shape(rows, request.length), leave)

    for request in requests:
        run.at(request.arrival_s, lambda request=request: arrive(request))  # type: ignore[misc]
    return run.report()


def simulate_generation(
    setting: Setting, requests: Sequence[TextRequest], slots: int, capacity: int, chunk: int, seed: int = 0
) -> Report:
    """Requests that share `slots` cache rows of `capacity` tokens, prompts read in chunks of `chunk` tokens.

    StagelineError where a request does not fit a cache row.
    """
    longest = max((request.prompt + request.output for request in requests), default=0)
    if longest > capacity:
        raise StagelineError(f"a request has {longest} tokens, a cache row holds {capacity}; give a larger context")
    return _Generation(setting, slots, capacity, chunk, seed).run_all(requests)


class _Run:
    """Time, servers, and what is counted."""

    def __init__(self, setting: Setting, seed: int):
        self.setting = setting
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.free_at: dict[int | str, float] = {}  # of a processor or a link: when all that came to it is done
        self.busy_s = [0.0] * len(setting.stages)
        self.waits: list[float] = []
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.latencies: list[float] = []
        self.tokens = 0
        self.first_s: float | None = None
        self.inside, self.changed_s, self.area = 0, 0.0, 0.0

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self.events, (when_s, next(self.count), what))

    def go(self) -> None:
        """Let all events happen."""
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()

    def send(self, shape: Shape, leave: Callable[[], None], stage: int = 0) -> None:
        """A micro-batch comes to a stage, by its link if it has one."""
        here = self.setting.stages[stage]
        copy_s = here.copy(shape) if here.copy is not None else 0.0
        if copy_s and self.setting.overlap:
            self.at(self._serve(here.link, copy_s), lambda: self._compute(shape, leave, stage, 0.0))
        else:
            self._compute(shape, leave, stage, copy_s)

    def _compute(self, shape: Shape, leave: Callable[[], None], stage: int, copy_s: float) -> None:
        here = self.setting.stages[stage]
        taken_s = here.compute(shape) * here.slowdown
        if here.jitter:
            taken_s *= self.random.lognormvariate(0.0, here.jitter)
        if stage == 0:
            self.waits.append(max(0.0, self.free_at.get(here.processor, 0.0) - self.now))
        self.busy_s[stage] += taken_s
        done_s = self._serve(here.processor, copy_s + taken_s)
        if stage + 1 < len(self.setting.stages):
            self.at(done_s, lambda: self.send(shape, leave, stage + 1))
        else:
            self.at(done_s + self.setting.host_s, leave)

    def _serve(self, server: int | str, seconds: float) -> float:
        """When a server that is asked now will be done, first come, first served."""
        self.free_at[server] = max(self.now, self.free_at.get(server, 0.0)) + seconds
        return self.free_at[server]

    def enter(self, arrival_s: float) -> None:
        """A request arrives."""
        self.first_s = arrival_s if self.first_s is None else self.first_s
        self._step(1)

    def leave(self, arrival_s: float, tokens: int) -> None:
        """A request is done."""
        self.latencies.append(self.now - arrival_s)
        self.tokens += tokens
        self._step(-1)

    def _step(self, change: int) -> None:
        self.area += self.inside * (self.now - self.changed_s)
        self.inside, self.changed_s = self.inside + change, self.now

    def report(self) -> Report:
        """Let everything happen and tell what it gave."""
        self.go()
        stages = self.setting.stages
        duration_s = self.now - (self.first_s or 0.0)
        share = [busy / duration_s if duration_s else 0.0 for busy in self.busy_s]
        energy_j = sum(
            stage.busy_w * busy_s + stage.idle_w * max(0.0, duration_s - busy_s)
            for stage, busy_s in zip(stages, self.busy_s, strict=True)
        )
        return Report(
            len(self.latencies),
            duration_s,
            len(self.latencies) / duration_s if duration_s else 0.0,
            self.tokens / duration_s if duration_s else 0.0,
            Spread.of(self.latencies),
            Spread.of(self.ttft),
            Spread.of(self.tpot),
            Spread.of(self.waits),
            tuple(share),
            1 - sum(share) / len(stages),
            self.area / duration_s if duration_s else 0.0,
            energy_j,
            sum(stage.price_per_h for stage in stages) / 3600 * duration_s,
        )


@dataclass(eq=False)
class _Text:
    request: TextRequest
    first_token_s: float = field(default=0.0)


class _Generation(_Run):
    """The runtime's scheduler, its steps run by simulated stages."""

    def __init__(self, setting: Setting, slots: int, capacity: int, chunk: int, seed: int):
        super().__init__(setting, seed)
        stages = len(setting.stages)
        self.scheduler = Scheduler(slots, capacity, min(stages, slots), chunk, stages)
        self.texts: dict[Continuation, _Text] = {}

    def run_all(self, requests: Sequence[TextRequest]) -> Report:
        for number, request in enumerate(requests):
            self.at(request.arrival_s, lambda n=number, r=request: self.arrive(n, r))  # type: ignore[misc]
        return self.report()

    def arrive(self, number: int, request: TextRequest) -> None:
        self.enter(request.arrival_s)
        continuation = Continuation([number] * request.prompt, request.prompt)  # no two prompts begin alike
        self.texts[continuation] = _Text(request)
        self.scheduler.add(continuation)
        self.issue()

    def issue(self) -> None:
        while (step := self.scheduler.next()) is not None:
            past = round(sum(row.start for row in step.rows) / len(step.rows))
            picks = int(any(row.last for row in step.rows))
            self.send(Shape(step.slots, step.length, past, picks), lambda step=step: self.done(step))  # type: ignore[misc]

    def done(self, step: Step) -> None:
        self.scheduler.done(step)
        for _, row in chosen_rows(step):
            continuation = row.continuation
            text = self.texts[continuation]
            continuation.tokens.append(-1)
            drawn = len(continuation.tokens) - text.request.prompt
            if drawn == 1:
                text.first_token_s = self.now
                self.ttft.append(self.now - text.request.arrival_s)
            if drawn == text.request.output:
                if drawn > 1:
                    self.tpot.append((self.now - text.first_token_s) / (drawn - 1))
                self.scheduler.end(continuation)
                self.leave(text.request.arrival_s, text.request.output)
                del self.texts[continuation]
        self.issue()


def replicas_needed(
    simulated: Callable[[float], Report], rate_per_s: float, ttft_p99_s: float, most: int = 100_000
) -> tuple[int, Report] | None:
    """The fewest equal pipelines that share `rate_per_s` with the 99th percentile of the time to the first token (or of
    the latency, where there are no tokens) within `ttft_p99_s`, and the report of one of them; None where `most` are
    not enough.

    Arrivals are dealt out at random, so each pipeline sees a Poisson process of its share: one stands for all. A share
    above 95 % of what a pipeline does when all requests come at once counts as too much, whatever the percentile: it
    would not be kept for longer than the simulated time.
    """

    def held(replicas: int) -> Report | None:
        report = simulated(rate_per_s / replicas)
        p99_s = report.ttft.p99 or report.latency.p99
        return report if p99_s <= ttft_p99_s else None

    fewest = math.ceil(rate_per_s / (_MOST_LOAD * simulated(math.inf).requests_per_s))
    if fewest > most:
        return None
    low, high = fewest - 1, fewest
    best = held(high)
    while best is None:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
        best = held(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = held(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return high, best

"""A pipeline simulated by discrete events: its performance under a load, before it is built.

Cores and links are servers with a queue each, first come, first served; a micro-batch passes through them in order. A
core with several stages first runs the one closest to the end of the pipeline, as the runtime's workers do. Cores that
share memory slow each other down while they compute at the same time. The runtime's own scheduler
(`stageline.runtime.generation.scheduler`) drives generation: the simulated stages run the steps that it issues. The
same seed repeats the same run.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from stageline.models.errors import StagelineError
from stageline.runtime.batching.micro_batch import default_rows
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.meter import Percentiles
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.steps import Step, chosen
from stageline.runtime.workload import Shape

_MAX_LOAD = 0.95  # of the throughput when all requests arrive at once
Seconds = Callable[[Shape], float]
"""Seconds that a micro-batch takes."""


@dataclass(frozen=True)
class SimulatedStage:
    """A stage: seconds that a micro-batch takes on it (`compute`), and to get there over `link` (`copy`). Stages that
    name the same link or `core` share it. `contention` is the share by which it takes longer for each other core that
    computes at the same time. `slowdown` multiplies its times; `jitter` is the standard deviation of the logarithm of a
    random factor on each."""

    compute: Seconds
    core: int
    copy: Seconds | None = None
    link: str = ""
    contention: Callable[[Shape], float] | None = None
    slowdown: float = 1.0
    jitter: float = 0.0
    busy_w: float = 0.0
    idle_w: float = 0.0
    price_per_h: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A pipeline to simulate. Without `overlap` a stage waits for its own copies. The driver of generation takes
    `host_step_s` for each step that leaves the last stage, and `host_row_s` for each token sampled from it. `packs`:
    the engines take packed tokens."""

    stages: tuple[SimulatedStage, ...]
    overlap: bool = True
    host_step_s: float = 0.0
    host_row_s: float = 0.0
    packs: bool = False

    @property
    def places(self) -> int:
        """How many stages can compute at the same time."""
        return len({stage.core for stage in self.stages})


@dataclass(frozen=True)
class BatchRequest:
    """Rows of one length that arrive together."""

    arrival_s: float
    rows: int
    length: int


@dataclass(frozen=True)
class TextRequest:
    """A prompt of `prompt` tokens, to be continued by `output` tokens."""

    arrival_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class SimulationResult:
    """Figures of a run, from its first arrival to its last result.

    `ttft` is the time to the first token, `tpot` the time per later token (both of generation only), `wait` the time
    that a micro-batch queued before the first stage. `bubble` is the share of the stages' time in which they were idle.
    """

    requests: int
    duration_s: float
    requests_per_s: float
    tokens_per_s: float
    latency: Percentiles
    ttft: Percentiles
    tpot: Percentiles
    wait: Percentiles
    utilisation: tuple[float, ...]
    bubble: float
    in_system: float
    energy_j: float
    cost: float


def simulate_batches(
    setting: Setting, requests: Sequence[BatchRequest], micro_rows: int | None = None, seed: int = 0
) -> SimulationResult:
    """Simulate requests that are cut into micro-batches of at most `micro_rows` rows (None: as the pipeline would cut
    them). A request is done when all of its micro-batches are.
    """
    run = _Run(setting, seed)

    def arrive(request: BatchRequest) -> None:
        run.enter(request.arrival_s)
        max_rows = micro_rows or default_rows(request.rows, request.length, setting.places, ragged=False)
        count = -(-request.rows // max_rows)
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
) -> SimulationResult:
    """Simulate requests that share `slots` cache rows of `capacity` tokens; prompts are read in chunks of `chunk`
    tokens.

    StagelineError if a request does not fit a cache row.
    """
    max_tokens = max((request.prompt + request.output for request in requests), default=0)
    if max_tokens > capacity:
        raise StagelineError(f"a request has {max_tokens} tokens, a cache row holds {capacity}; set a larger capacity")
    return _GenerationRun(setting, slots, capacity, chunk, seed).run_all(requests)


@dataclass(eq=False, slots=True)
class _Work:
    """A micro-batch on a core or in its queue. `left_s` would be left if no other core computed; `paced_s` is when that
    was computed last, `event` the number of the event that ends it."""

    stage: int
    left_s: float
    copy_s: float
    contention: float
    then: Callable[[], None]
    came_s: float
    began_s: float = 0.0
    paced_s: float = 0.0
    rate: float = 0.0
    event: int = 0


class _Run:
    """The simulated time, the servers, and the counters."""

    def __init__(self, setting: Setting, seed: int):
        self.setting = setting
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count(1)
        self.free_at: dict[str, float] = {}  # by link, and the host: when it has done all work so far
        # By core, then by stage, the last first:
        self.queues: dict[int, dict[int, deque[_Work]]] = {stage.core: {} for stage in setting.stages}
        for number, stage in reversed(list(enumerate(setting.stages))):
            self.queues[stage.core][number] = deque()
        self.running: dict[int, _Work] = {}  # by core
        self.contended = any(stage.contention is not None for stage in setting.stages)
        self.busy_s = [0.0] * len(setting.stages)
        self.waits: list[float] = []
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.latencies: list[float] = []
        self.tokens = 0
        self.first_s: float | None = None
        self.inside, self.changed_s, self.area = 0, 0.0, 0.0

    def at(self, when_s: float, what: Callable[[], None]) -> int:
        """Schedule `what` and return the event's number."""
        number = next(self.count)
        heapq.heappush(self.events, (when_s, number, what))
        return number

    def go(self) -> None:
        """Run all events."""
        while self.events:
            self.now, self.event, what = heapq.heappop(self.events)
            what()

    def send(self, shape: Shape, leave: Callable[[], None], stage: int = 0) -> None:
        """A micro-batch arrives at a stage, over its link if it has one."""
        here = self.setting.stages[stage]
        copy_s = here.copy(shape) if here.copy is not None else 0.0
        if copy_s and self.setting.overlap:
            self.at(self.serve(here.link, copy_s), lambda: self._queue(shape, leave, stage, 0.0))
        else:
            self._queue(shape, leave, stage, copy_s)

    def _queue(self, shape: Shape, leave: Callable[[], None], stage: int, copy_s: float) -> None:
        here = self.setting.stages[stage]
        taken_s = here.compute(shape) * here.slowdown
        if here.jitter:
            taken_s *= self.random.lognormvariate(0.0, here.jitter)
        last = stage + 1 == len(self.setting.stages)
        then = leave if last else partial(self.send, shape, leave, stage + 1)
        contention = here.contention(shape) if here.contention is not None else 0.0
        self.queues[here.core][stage].append(_Work(stage, copy_s + taken_s, copy_s, contention, then, self.now))
        if here.core not in self.running:
            self._begin(here.core)

    def _begin(self, core: int) -> None:
        work = next(queue for queue in self.queues[core].values() if queue).popleft()
        work.began_s = work.paced_s = self.now
        if work.stage == 0:
            self.waits.append(self.now - work.came_s)
        self.running[core] = work
        self._pace(core)

    def _pace(self, begun: int | None) -> None:
        """Set the pace of what runs, after something has started (on core `begun`) or ended."""
        others = len(self.running) - 1
        for core in self.running if self.contended else [begun] if begun is not None else []:
            work = self.running[core]
            rate = 1 / (1 + work.contention * others)
            if rate != work.rate:
                work.left_s -= work.rate * (self.now - work.paced_s)
                work.paced_s, work.rate = self.now, rate
                work.event = self.at(self.now + work.left_s / rate, partial(self._end, core))

    def _end(self, core: int) -> None:
        work = self.running.get(core)
        if work is None or work.event != self.event:
            return  # its pace has changed since
        del self.running[core]
        self.busy_s[work.stage] += self.now - work.began_s - work.copy_s
        work.then()  # the next stage may be on the same core
        if core not in self.running:
            if any(self.queues[core].values()):
                self._begin(core)
            else:
                self._pace(None)

    def serve(self, server: str, seconds: float) -> float:
        """When a link or the host will be done with work that arrives now, first come, first served."""
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

    def report(self) -> SimulationResult:
        """Run all events and return the figures."""
        self.go()
        stages = self.setting.stages
        duration_s = self.now - (self.first_s or 0.0)
        share = [busy / duration_s if duration_s else 0.0 for busy in self.busy_s]
        energy_j = sum(
            stage.busy_w * busy_s + stage.idle_w * max(0.0, duration_s - busy_s)
            for stage, busy_s in zip(stages, self.busy_s, strict=True)
        )
        return SimulationResult(
            len(self.latencies),
            duration_s,
            len(self.latencies) / duration_s if duration_s else 0.0,
            self.tokens / duration_s if duration_s else 0.0,
            Percentiles.of(self.latencies),
            Percentiles.of(self.ttft),
            Percentiles.of(self.tpot),
            Percentiles.of(self.waits),
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


class _GenerationRun(_Run):
    """Runs the steps of the runtime's scheduler in simulated stages."""

    def __init__(self, setting: Setting, slots: int, capacity: int, chunk: int, seed: int):
        super().__init__(setting, seed)
        self.scheduler = Scheduler(slots, capacity, min(setting.places, slots), chunk, setting.places, setting.packs)
        self.texts: dict[Continuation, _Text] = {}

    def run_all(self, requests: Sequence[TextRequest]) -> SimulationResult:
        for number, request in enumerate(requests):
            self.at(request.arrival_s, lambda n=number, r=request: self.arrive(n, r))  # type: ignore[misc]
        return self.report()

    def arrive(self, number: int, request: TextRequest) -> None:
        self.enter(request.arrival_s)
        continuation = Continuation([number] * request.prompt, request.prompt)  # no two prompts share a prefix
        self.texts[continuation] = _Text(request)
        self.scheduler.add(continuation)
        self.issue()

    def issue(self) -> None:
        while (step := self.scheduler.next()) is not None:
            self.send(_shape(step), partial(self.left, step))

    def left(self, step: Step) -> None:
        """A step has left the last stage, and the driver handles it."""
        host_s = self.setting.host_step_s + self.setting.host_row_s * int(step.arrays.last.sum())
        self.at(self.serve("host", host_s), partial(self.done, step))

    def done(self, step: Step) -> None:
        self.scheduler.done(step)
        for _, continuation in chosen(step):
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


def _shape(step: Step) -> Shape:
    """A step as a micro-batch: packed tokens of prompts, and what is beside them, as one row."""
    rows = step.arrays
    past = round(int(rows.starts.sum()) / len(rows.starts))
    if step.first_slot is None and step.kind != "decode":
        return Shape(1, step.batch, past, int(rows.last.sum()))
    return Shape(step.batch, step.length, past, int(rows.last.any()))


def replicas_needed(
    simulated: Callable[[float], SimulationResult], rate_per_s: float, ttft_p99_s: float, max_replicas: int = 100_000
) -> tuple[int, SimulationResult] | None:
    """The smallest number of equal pipelines that share `rate_per_s` with the 99th percentile of the time to the first
    token (or of the latency, if there are no tokens) within `ttft_p99_s`, and the report of one of them. None if
    `max_replicas` are not enough.

    Arrivals are distributed at random, so each pipeline sees a Poisson process at its share of the rate, and one stands
    for all. More than 95 % of the throughput when all requests arrive at once is too much whatever the percentile: the
    pipeline could not keep it up for longer than the simulated time.
    """

    def held(replicas: int) -> SimulationResult | None:
        report = simulated(rate_per_s / replicas)
        p99_s = report.ttft.p99 or report.latency.p99
        return report if p99_s <= ttft_p99_s else None

    first = math.ceil(rate_per_s / (_MAX_LOAD * simulated(math.inf).requests_per_s))
    if first > max_replicas:
        return None
    low, high = first - 1, first
    best = held(high)
    while best is None:
        if high >= max_replicas:
            return None
        low, high = high, min(2 * high, max_replicas)
        best = held(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = held(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return high, best

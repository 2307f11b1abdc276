"""Figures against theory: stages that sleep for known times, through the real lanes, batches and generator.

Theory is computed from the times that the stages really slept, since a busy machine oversleeps: what the figures say
beyond that is our own error, and it must stay within 3 %. A machine that wakes sleepers late wakes our threads late as
well; so a measurement is made again, a few times at most, where the sleepers overslept by more than 1 %. That depends
on the machine alone, never on what was measured.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from time import perf_counter
from typing import TypeVar

import numpy as np
import pytest
from stageline.runtime.batching.batches import WINDOW
from stageline.runtime.bench import figures
from stageline.runtime.bench.client import Client, DriveResult
from stageline.runtime.bench.contenders import PipelineContender
from stageline.runtime.bench.figures import StageUse
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import Slo
from stageline.runtime.bundle.manifest import CACHED_INPUTS, GenerationDefaults, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, CacheSize, PackedRows
from stageline.runtime.executor import Executor
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline, PipelineStage
from stageline.runtime.stages.opening import StageSet

pytestmark = pytest.mark.alone
WITHIN = 0.03
T = TypeVar("T")


@dataclass
class Sleeper:
    """An engine that sleeps: `seconds` says how long, given the inputs. `slept` is what it really did."""

    gives: tuple[str, Sequence[int]]
    seconds: deque[float]
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    max_rows: int | None = None
    packs: bool = False
    block_tokens: int | None = None
    slept: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    asked: float = 0.0

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        began = perf_counter()
        self.seconds.rotate(-1)
        self.asked += self.seconds[-1]
        time.sleep(self.seconds[-1])
        self.ended.append(perf_counter())
        self.slept.append(self.ended[-1] - began)
        name, shape = self.gives
        return {name: np.zeros((len(next(iter(inputs.values()))), *shape), np.float32)}

    def step(self, inputs: Mapping[str, Array], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        return self.run(inputs, outputs)

    def close(self) -> None: ...


def undisturbed(measure: Callable[[], T], engines: Callable[[T], Sequence[Sleeper]]) -> T:
    """What `measure` gives, of the first of five times at which no sleeper overslept, or else of the last."""
    for _ in range(5):
        done = measure()
        if all(sum(engine.slept) < 1.01 * engine.asked for engine in engines(done)):
            break
    return done


@dataclass
class Tandem:
    """Two sleeping stages in a pipeline, one row a request."""

    engines: list[Sleeper]
    contender: PipelineContender

    def client(self) -> Client:
        return Client(self.contender, [Item((), ((1,),), {"x": np.zeros((1, 1), np.float32)}, None)], Event())


@pytest.fixture
def tandem() -> Iterator[Callable[..., Tandem]]:
    """Makes one whose stages sleep for these times in turn; closes it at the end."""
    made: list[Tandem] = []

    def make(first: Sequence[float], second: Sequence[float]) -> Tandem:
        x, y = (TensorSpec(name=name, dtype="float32", shape=("batch", 1)) for name in "xy")
        engines = [Sleeper(("h", (1,)), deque(first)), Sleeper(("y", (1,)), deque(second))]
        stages = [
            PipelineStage(("x",), ("h",), lambda device: engines[0]),
            PipelineStage(("h",), ("y",), lambda device: engines[1]),
        ]
        pipeline = Pipeline.of_stages(Signature((x,), (y,)), stages, queue=4096)
        made.append(Tandem(engines, PipelineContender("stageline", pipeline)))
        return made[-1]

    yield make
    for one in made:
        one.contender.close()


@dataclass
class Seen:
    """A drive, and what the stages did meanwhile."""

    made: Tandem
    answers: DriveResult
    use: StageUse

    @property
    def figures(self) -> dict[str, float]:
        found = figures.of_requests(self.answers, 1, Slo(latency_s=0.3))
        bubble = figures.bubble_ratio(self.use, figures.active_s(self.answers))
        assert bubble is not None
        return {**found, "bubble_ratio": bubble}


def seen(make: Callable[[], Tandem], drive: str, *given: object) -> Seen:
    made = make()
    assert made.contender.pipeline is not None
    before = made.contender.pipeline.stats().stages
    answers = getattr(made.client(), drive)(*given)
    return Seen(made, answers, StageUse.between(before, made.contender.pipeline.stats().stages))


def seen_undisturbed(make: Callable[[], Tandem], drive: str, *given: object) -> Seen:
    return undisturbed(lambda: seen(make, drive, *given), lambda done: done.made.engines)


def departures(arrivals: Sequence[float], engines: Sequence[Sleeper]) -> list[float]:
    """First come, first served through both stages, with at most WINDOW micro-batches a stage between their ends."""
    first = second = 0.0
    left: list[float] = []
    for number, arrival in enumerate(arrivals):
        window = left[number - 2 * WINDOW] if number >= 2 * WINDOW else 0.0
        first = max(arrival, first, window) + engines[0].slept[number]
        second = max(first, second) + engines[1].slept[number]
        left.append(second)
    return left


@pytest.mark.parametrize(
    ("spacing_s", "first", "second"),
    [(0.110, [0.060], [0.090]), (0.075, [0.060], [0.090]), (0.100, [0.030, 0.120], [0.090, 0.030])],
    ids=["idle between", "overloaded", "in turns"],
)
def test_an_open_loop_gives_what_the_theory_of_two_servers_in_tandem_says(
    tandem: Callable[..., Tandem], spacing_s: float, first: list[float], second: list[float]
) -> None:
    arrivals = [spacing_s * number for number in range(22)]
    drive = seen_undisturbed(partial(tandem, first, second), "open_loop", arrivals)
    left = departures(arrivals, drive.made.engines)
    latencies = [end - arrival for arrival, end in zip(arrivals, left, strict=True)]
    slept = [sum(engine.slept) for engine in drive.made.engines]
    found, seconds = drive.figures, left[-1]
    assert found["requests_per_s"] == pytest.approx(len(arrivals) / seconds, rel=WITHIN)
    assert found["latency_p50_s"] == pytest.approx(float(np.median(latencies)), rel=WITHIN)
    assert found["latency_mean_s"] == pytest.approx(float(np.mean(latencies)), rel=WITHIN)
    # The slowest of a few requests is the one whose thread was woken late: the last stage's own clock knows that too.
    clock = np.array(drive.made.engines[1].ended) - drive.answers.began_at - arrivals
    for percentile in (90, 95, 99):
        expected = float(np.percentile(clock, percentile))
        assert found[f"latency_p{percentile}_s"] == pytest.approx(expected, rel=WITHIN)
    assert found["latency_max_s"] == pytest.approx(float(clock.max()), rel=WITHIN)
    assert found["goodput_per_s"] == pytest.approx(
        sum(one <= 0.3 for one in latencies) / seconds, rel=WITHIN, abs=2 / seconds
    )
    utilisation = [busy_s / drive.answers.seconds for busy_s in drive.use.busy_s]
    assert utilisation == pytest.approx([one / seconds for one in slept], rel=WITHIN)
    active = sum(
        end - max(begin, before)
        for begin, end, before in zip(arrivals, left, [0.0, *left], strict=False)
        if end > before
    )
    assert found["bubble_ratio"] == pytest.approx(1 - sum(slept) / (2 * active), abs=WITHIN)


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_a_closed_loop_gives_what_theory_says(tandem: Callable[..., Tandem], concurrency: int) -> None:
    drive = seen_undisturbed(partial(tandem, [0.060], [0.090]), "closed_loop", concurrency, 1.9)
    made = drive.made
    count = len(made.engines[1].slept)
    left: list[float] = []
    first = second = 0.0
    latencies = []
    for number in range(count):
        arrival = left[number - concurrency] if number >= concurrency else 0.0
        first = max(arrival, first) + made.engines[0].slept[number]
        second = max(first, second) + made.engines[1].slept[number]
        left.append(second)
        latencies.append(second - arrival)
    found = drive.figures
    assert len(drive.answers.requests) == count
    assert found["requests_per_s"] == pytest.approx(count / left[-1], rel=WITHIN)
    assert found["latency_p50_s"] == pytest.approx(float(np.median(latencies)), rel=WITHIN)
    assert found["in_flight"] == pytest.approx(sum(latencies) / left[-1], rel=WITHIN)
    slept = sum(sum(engine.slept) for engine in made.engines)
    assert found["bubble_ratio"] == pytest.approx(1 - slept / (2 * left[-1]), abs=WITHIN)


def test_a_stall_shows_in_the_percentiles_of_an_open_loop_and_hides_in_a_closed_one(
    tandem: Callable[..., Tandem],
) -> None:
    stall, count = 0.5, 150
    stalls = [0.002] * 70 + [stall] + [0.002] * (count - 71)
    arrivals = [0.01 * number for number in range(count)]
    open_loop = seen(partial(tandem, stalls, [0.001]), "open_loop", arrivals)
    left = departures(arrivals, open_loop.made.engines)
    expected = float(np.percentile([end - arrival for arrival, end in zip(arrivals, left, strict=True)], 99))
    assert open_loop.figures["latency_p99_s"] == pytest.approx(expected, rel=WITHIN)
    assert open_loop.figures["latency_p99_s"] > 0.9 * stall
    assert open_loop.figures["latency_p90_s"] > 0.5 * stall
    closed_loop = seen(partial(tandem, stalls, [0.001]), "closed_loop", 1, 1.2)
    assert len(closed_loop.answers.requests) > 100
    assert closed_loop.figures["latency_max_s"] > 0.9 * stall
    assert closed_loop.figures["latency_p99_s"] < 0.5 * stall


@dataclass
class Generated:
    engines: list[Sleeper]
    answers: DriveResult
    use: StageUse


def generated(prompt: int, new: int, seconds: float) -> Generated:
    """One request after the other through two sleeping stages, for so long."""
    vocabulary = 8
    names = [(("input_ids",), ("h",)), (("h", *CACHED_INPUTS[1:]), ("logits",))]
    engines = [Sleeper(("h", (1,)), deque([0.060])), Sleeper(("logits", (1, vocabulary)), deque([0.100]))]
    stages = [
        PipelineStage(reads, gives, lambda device, engine=engine: engine)  # type: ignore[misc]
        for (reads, gives), engine in zip(names, engines, strict=True)
    ]
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"))
    rest = tuple(TensorSpec(name=name, dtype="int64", shape=("batch",)) for name in CACHED_INPUTS[1:])
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "length", vocabulary))
    signature, model = Signature((ids,), (logits,), derived=rest), TextModel(vocabulary, GenerationDefaults(), None)
    options = PipelineOptions(prefill_chunk=32)
    pipeline = Pipeline(Executor.open(signature, StageSet(tuple(stages)), options, model, CacheSize(2, 64)))
    contender = PipelineContender("stageline", pipeline)
    try:
        before = pipeline.stats().stages
        client = Client(contender, [Item((), ((1,) * prompt,), {}, new)], Event())
        answers = client.closed_loop(1, seconds)
        return Generated(engines, answers, StageUse.between(before, pipeline.stats().stages))
    finally:
        contender.close()


def test_generation_gives_the_times_of_its_steps() -> None:
    prompt, new = 5, 6
    done = undisturbed(lambda: generated(prompt, new, 3.4), lambda done: done.engines)
    steps = np.array([engine.slept for engine in done.engines]).sum(axis=0).reshape(-1, new)
    whole, first = steps.sum(axis=1), steps[:, 0]
    found = figures.of_requests(done.answers, 1, Slo())
    assert len(done.answers.requests) == len(steps)
    assert found["tokens_per_s"] == pytest.approx(steps.size / steps.sum(), rel=WITHIN)
    assert found["tokens_in_per_s"] == pytest.approx(prompt * len(steps) / steps.sum(), rel=WITHIN)
    assert found["ttft_p50_s"] == pytest.approx(float(np.median(first)), rel=WITHIN)
    assert found["tpot_p50_s"] == pytest.approx(float(np.median((whole - first) / (new - 1))), rel=WITHIN)
    assert found["itl_p50_s"] == pytest.approx(float(np.median(steps[:, 1:])), rel=WITHIN)
    assert found["latency_p50_s"] == pytest.approx(float(np.median(whole)), rel=WITHIN)
    bubble = figures.bubble_ratio(done.use, figures.active_s(done.answers))
    assert bubble == pytest.approx(0.5, abs=WITHIN)  # one request: one stage of two works at a time

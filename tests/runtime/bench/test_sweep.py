"""The search of a sweep, on queues whose knee and largest rate within an SLO are known from theory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.bench import figures
from stageline.runtime.bench.capacity import Capacity, bracket, capacities, held, settled
from stageline.runtime.bench.records import Load, Measurement, Slo
from stageline.runtime.bench.sweep import LEAST_REPEATS, RESOLUTION, Sweep

AT_RATES = Load("Rate")


class Queue(Protocol):
    """Answers a repeat of a load with figures and its number of requests."""

    def answer(self, load: Load) -> tuple[int, dict[str, float]]: ...


@dataclass
class MarkovQueue:
    """M/M/1 in `seconds` of simulated time. A request at rate L stays longer than t with probability
    exp(-(service - L) t)."""

    service_per_s: float
    bound_s: float
    seconds: float = 60.0
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def answer(self, load: Load) -> tuple[int, dict[str, float]]:
        rate, draw = load.rate_per_s, self.draw
        count = max(1, round((rate or self.service_per_s) * self.seconds))
        services = draw.exponential(1 / self.service_per_s, count)
        if rate is None:  # N at a time keep the server busy: its latency is N services
            at_a_time = load.concurrency or 1
            return count, times(count / services.sum(), np.full(count, at_a_time * services.mean()), self.bound_s)
        arrivals = np.cumsum(draw.exponential(1 / rate, count))
        waits, wait = np.empty(count), 0.0
        gaps = np.diff(arrivals, append=arrivals[-1])
        for number in range(count):  # Lindley's recursion
            waits[number] = wait
            wait = max(0.0, wait + services[number] - gaps[number])
        return count, times(rate, waits + services, self.bound_s)


@dataclass
class Balanced:
    """`stages` stages of `each_s` in turn: N at a time give exactly min(N, stages) / (stages * each_s); rates up to
    `limit_per_s` hold the SLO."""

    stages: int
    each_s: float
    limit_per_s: float
    bound_s: float = math.inf

    def answer(self, load: Load) -> tuple[int, dict[str, float]]:
        if load.rate_per_s is None:
            at_a_time = load.concurrency or 1
            speed = min(at_a_time, self.stages) / (self.stages * self.each_s)
            return 1000, times(speed, np.full(1, at_a_time / speed), self.bound_s)
        return 1000, {
            **times(load.rate_per_s, np.ones(1), 2.0),
            "slo_share": float(load.rate_per_s <= self.limit_per_s),
        }


def times(speed: float, latencies: np.ndarray, bound_s: float) -> dict[str, float]:
    return {
        "requests_per_s": float(speed),
        "failed_share": 0.0,
        "latency_mean_s": float(latencies.mean()),
        "slo_share": float((latencies <= bound_s).mean()),
    }


def swept(contenders: Mapping[str, Queue], slo: Slo, most: int = 6) -> list[Measurement]:
    """Carry out a sweep as the runner does."""
    sweep, found = Sweep(list(contenders), AT_RATES, slo, most, 1000.0), []
    for load in sweep:
        repeats: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        requests = dict.fromkeys(contenders, 0)
        while pending := [name for name in contenders if sweep.again(load, name)]:
            for name in pending:
                count, one = contenders[name].answer(load)
                sweep.measured(load, name, count, one)
                repeats[name].append(one)
                requests[name] += count
        found += [
            Measurement(name, load, 1.0, requests[name], figures.over_repeats(made))
            for name, made in repeats.items()
            if made
        ]
        assert len(found) < 200
    return found


def capacity(contenders: Mapping[str, Queue], slo: Slo) -> dict[str, Capacity]:
    return {one.contender: one for one in capacities(swept(contenders, slo), slo)}


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_rate_of_a_markov_queue_is_the_one_of_theory(seed: int) -> None:
    slo = Slo(latency_s=math.log(10) / 50)  # 90 % within it up to 100 - 50 requests/s
    queue = MarkovQueue(100.0, slo.latency_s or 0.0, draw=np.random.default_rng(seed))
    found = capacity({"stageline": queue}, slo)["stageline"]
    assert found.peak_per_s == pytest.approx(100, rel=0.05)
    assert found.best is not None
    assert found.best.rate_per_s == pytest.approx(50, rel=0.15)
    assert found.over_per_s is not None
    assert found.over_per_s / (found.best.rate_per_s or 0) <= RESOLUTION * 1.01


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(1e-3, 10.0), st.floats(0.04, 0.999))
def test_knee_and_rate_of_even_stages_are_found(stages: int, each_s: float, share: float) -> None:
    limit = share / each_s
    found = capacity({"stageline": Balanced(stages, each_s, limit)}, Slo(latency_s=1.0))["stageline"]
    assert found.knee is not None
    assert found.knee.concurrency is not None
    assert stages / 2 < found.knee.concurrency < 2 * stages or stages == 1
    assert not found.climbing
    assert found.best is not None
    assert found.sure
    assert limit / (RESOLUTION * 1.01) <= (found.best.rate_per_s or 0) <= limit


def test_contenders_are_measured_at_the_same_loads_and_each_has_its_own_limit() -> None:
    slow, fast = Balanced(2, 0.02, 20.0), Balanced(2, 0.01, 90.0)
    measured = swept({"slow": slow, "fast": fast}, Slo(latency_s=1.0))
    found = {one.contender: one for one in capacities(measured, Slo(latency_s=1.0))}
    assert [one.best is not None and one.best.rate_per_s for one in found.values()] == pytest.approx([19, 88], rel=0.1)
    loads = {name: {str(one.load) for one in measured if one.contender == name} for name in found}
    assert loads["slow"] < loads["fast"]
    beyond = {one.load.rate_per_s or 0.0 for one in measured if str(one.load) not in loads["slow"]}
    assert min(beyond) > 1.25 * 50


def test_a_rate_that_tells_nothing_of_a_contender_is_measured_twice() -> None:
    """The second one's rates are a tenth of what the first one holds, too few requests to be sure of it."""
    slo = Slo(latency_s=1.0, share=0.99)
    fast, slow = MarkovQueue(50.0, 1.0, 1.0), MarkovQueue(5.0, 1.0, 1.0)
    measured = swept({"fast": fast, "slow": slow}, slo)
    found = {one.contender: one for one in capacities(measured, slo)}
    best = found["fast"].best
    assert best is not None
    assert best.rate_per_s is not None
    below = [
        len(one.figures["slo_share"].values)
        for one in measured
        if one.contender == "fast" and one.load.rate_per_s and one.load.rate_per_s < best.rate_per_s / 4
    ]
    assert below
    assert set(below) == {LEAST_REPEATS}


def test_a_contender_that_fails_alone_is_asked_for_no_rate() -> None:
    measured = swept({"stageline": Balanced(1, 0.01, 0.0, 1e-6)}, Slo(latency_s=1e-6))
    (found,) = capacities(measured, Slo(latency_s=1e-6))
    assert found.over_alone
    assert found.best is None
    assert [one.load.concurrency for one in measured] == [1, 2]


def test_a_contender_that_holds_no_rate_has_none_and_the_search_ends() -> None:
    found = capacity({"stageline": Balanced(1, 0.01, 0.0)}, Slo(latency_s=1.0))["stageline"]
    assert found.best is None
    assert not found.over_alone
    assert found.sure
    assert found.over_per_s is not None
    assert found.over_per_s < 100 / 16


def test_without_bounds_there_are_closed_loops_alone() -> None:
    measured = swept({"stageline": Balanced(4, 0.01, 0.0)}, Slo())
    assert [one.load.concurrency for one in measured] == [1, 2, 4, 8]


def test_what_fails_ends_the_doubling() -> None:
    class Failing(Balanced):
        def answer(self, load: Load) -> tuple[int, dict[str, float]]:
            count, found = super().answer(load)
            return count, {**found, "failed_share": 0.2 if (load.concurrency or 0) >= 4 else 0.0}

    measured = swept({"stageline": Failing(64, 0.01, 0.0)}, Slo())
    assert [one.load.concurrency for one in measured] == [1, 2, 4]
    (found,) = capacities(measured, Slo())
    assert found.knee is not None
    assert found.knee.concurrency == 2


def test_sure_answers_take_few_repeats_and_close_ones_more() -> None:
    slo = Slo(latency_s=math.log(10) / 50)
    measured = swept({"stageline": MarkovQueue(100.0, slo.latency_s or 0.0, 10.0)}, slo)
    repeats = {
        one.load.rate_per_s: len(one.figures["slo_share"].values) for one in measured if one.load.rate_per_s is not None
    }
    near = [count for rate, count in repeats.items() if abs(rate - 50) < 10]
    far = [count for rate, count in repeats.items() if abs(rate - 50) > 20]
    assert max(near) > LEAST_REPEATS
    assert all(count <= min(6, max(near)) for count in far)


def test_an_answer_is_called_sure_no_more_often_than_it_should() -> None:
    """A share that lies on the bound: sure in at most 5 % of looks, after whatever number of repeats."""
    draw, wrong, tried = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        for count in (2, 4, 6):
            tried += 1
            wrong += settled(draw.normal(0.9, 0.02, count).tolist(), 0.9) is not None
    assert 0.035 < wrong / tried < 0.065


@pytest.mark.parametrize(
    ("shares", "requests", "bound", "expected"),
    [
        ((1.0, 1.0), 28, 0.9, (True, False)),  # 0.9^28 = 5.2 %: a contender at 90 % might have been lucky
        ((1.0, 1.0), 29, 0.9, (True, True)),
        ((1.0, 1.0), 298, 0.99, (True, False)),
        ((1.0, 1.0), 299, 0.99, (True, True)),
        ((0.0, 0.0), 2, 0.9, (False, True)),
        ((0.97, 0.91), 1000, 0.9, (True, False)),
        ((0.5, 0.95), 1000, 0.9, (False, False)),
        ((1.0,), 1000, 0.9, (True, False)),
    ],
)
def test_whether_a_bound_holds_and_how_surely(
    shares: tuple[float, ...], requests: int, bound: float, expected: tuple[bool, bool]
) -> None:
    assert held(shares, requests, bound) == expected


def test_a_knee_is_named_only_where_its_neighbours_were_measured() -> None:
    even = Balanced(4, 0.01, 0.0)

    def knee(*at_a_time: int) -> Load | None:
        loads = [Load("Concurrency", concurrency=n) for n in at_a_time]
        measured = [Measurement("stageline", one, 1.0, 9, figures.over_repeats([even.answer(one)[1]])) for one in loads]
        (found,) = capacities(measured, Slo())
        return found.knee

    assert knee(1, 2, 4, 8) == Load("Concurrency", concurrency=4)
    assert knee(8, 4, 2) == Load("Concurrency", concurrency=4)
    assert knee(1, 4, 8) is None
    assert knee(1, 4) is None
    assert knee(4) is None


def test_a_repeat_does_not_wait_for_a_single_request() -> None:
    sweep = Sweep(["slow"], AT_RATES, Slo(latency_s=60.0), 2, seconds=2.0)
    queue, rates = Balanced(1, 1.0, 0.0), []
    for load in sweep:
        rates += [load.rate_per_s] if load.rate_per_s else []
        while sweep.again(load, "slow"):
            sweep.measured(load, "slow", *queue.answer(load))
    assert rates == [0.5, 0.25]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, (None, None)),
        ({1.0: (True, True), 2.0: (True, False), 4.0: (False, True)}, (2.0, 4.0)),
        ({1.0: (False, True)}, (None, 1.0)),
        ({4.0: (False, False), 1.0: (False, False), 2.0: (True, True)}, (2.0, 4.0)),  # a slow request at 1/s
        ({1.0: (False, False), 2.0: (True, False)}, (None, 1.0)),
        ({1.0: (False, True), 2.0: (True, True)}, (None, 1.0)),
        ({1.0: (True, True), 2.0: (False, False), 3.0: (True, True)}, (3.0, None)),
    ],
)
def test_one_unlucky_sample_does_not_hide_what_surely_holds(
    answers: dict[float, tuple[bool, bool]], expected: tuple[float | None, float | None]
) -> None:
    assert bracket(answers) == expected

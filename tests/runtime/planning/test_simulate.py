"""The simulator against laws of queues and pipelines."""

import pytest
from stageline.models.errors import StagelineError
from stageline.runtime.planning.simulate import (
    BatchRequest,
    Setting,
    SimulatedStage,
    SimulationResult,
    TextRequest,
    replicas_needed,
    simulate_batches,
    simulate_generation,
)
from stageline.runtime.workload import Shape, poisson


def equal_stages(count: int, seconds: float = 0.01, **changes: float) -> Setting:
    return Setting(tuple(SimulatedStage(lambda shape: seconds, number, **changes) for number in range(count)))  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 3, 8, 32])
def test_bubble_of_equal_stages_is_that_of_gpipe(stages: int, micro_batches: int) -> None:
    """Huang et al., GPipe (2019): (S - 1) / (M + S - 1)."""
    report = simulate_batches(equal_stages(stages), [BatchRequest(0.0, micro_batches, 8)], 1)
    assert report.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_unequal_stages_take_the_sum_and_then_the_bottleneck_for_each_further_micro_batch() -> None:
    times = (0.01, 0.03, 0.02)
    setting = Setting(tuple(SimulatedStage(lambda shape, t=t: t, n) for n, t in enumerate(times)))  # type: ignore[misc]
    report = simulate_batches(setting, [BatchRequest(0.0, 9, 8)], 1)
    assert report.duration_s == pytest.approx(sum(times) + 8 * max(times))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_wait_of_one_stage_is_that_of_m_d_1(load: float) -> None:
    """Pollaczek-Khinchine for a fixed service time s: load x s / 2 (1 - load)."""
    service_s = 0.01
    arrivals = [BatchRequest(t, 1, 8) for t in poisson(load / service_s, 60_000, seed=3)]
    report = simulate_batches(equal_stages(1, service_s), arrivals, 1)
    assert report.wait.mean == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)
    assert report.utilisation[0] == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("stages", [1, 3])
def test_littles_law(stages: int) -> None:
    """The mean number of requests inside, an integral over time, is their rate times their mean time inside."""
    arrivals = [BatchRequest(t, 1 + n % 5, 8) for n, t in enumerate(poisson(25, 3000, seed=1))]
    report = simulate_batches(equal_stages(stages, jitter=0.5), arrivals, 1)
    assert report.in_system == pytest.approx(report.requests_per_s * report.latency.mean, rel=1e-9)


def generation(rate: float, stages: int = 2, count: int = 300) -> SimulationResult:
    """Steps of 4 ms a stage, and a tenth of a millisecond more for each row and token."""
    stage = tuple(SimulatedStage(lambda s: 0.004 + 1e-4 * s.batch * s.length, n) for n in range(stages))
    arrivals = [TextRequest(t, 20 + n % 50, 10 + n % 7) for n, t in enumerate(poisson(rate, count, seed=2))]
    return simulate_generation(Setting(stage), arrivals, slots=8, capacity=128, chunk=32)


def test_a_lone_request_takes_its_chunks_and_steps() -> None:
    stages = (SimulatedStage(lambda s: 0.004, 0), SimulatedStage(lambda s: 0.006, 1))
    report = simulate_generation(
        Setting(stages, host_step_s=0.0006, host_row_s=0.0004), [TextRequest(1.0, 70, 5)], 4, 128, 32
    )
    # Chunks of 32, 32 and 6 tokens follow each other, two of them running at a time.
    step_s = 0.011
    assert report.tpot.mean == pytest.approx(step_s)
    assert report.ttft.mean == pytest.approx(0.004 + 2 * 0.006 + 0.001 + 0.011, abs=0.006)
    assert report.latency.mean == pytest.approx(report.ttft.mean + 4 * step_s)
    assert report.tokens_per_s == pytest.approx(5 / report.duration_s)


def test_every_request_is_served_and_little_holds_for_generation() -> None:
    report = generation(rate=12)
    assert report.requests == 300
    assert report.in_system == pytest.approx(report.requests_per_s * report.latency.mean, rel=1e-9)
    assert report.ttft.p50 <= report.ttft.p90 <= report.ttft.p99


def test_more_load_makes_the_first_token_later() -> None:
    assert generation(5).ttft.p99 < generation(40).ttft.p99 < generation(400).ttft.p99


def test_a_seed_makes_a_run_repeatable() -> None:
    requests = [BatchRequest(t, 4, 8) for t in poisson(20, 500, seed=9)]
    runs = [simulate_batches(equal_stages(3, jitter=0.3), requests, 2, seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_a_straggler_sets_the_pace() -> None:
    stages = [SimulatedStage(lambda s: 0.01, n, slowdown=3.0 if n == 1 else 1.0) for n in range(3)]
    report = simulate_batches(Setting(tuple(stages)), [BatchRequest(0.0, 1000, 8)], 1)
    assert report.tokens_per_s == pytest.approx(8 / 0.03, rel=0.01)
    assert report.utilisation[1] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("shared", "overlap", "pace_s"), [(False, True, 0.02), (True, True, 0.04), (False, False, 0.03)]
)
def test_copies_overlap_unless_reported_otherwise_and_share_a_link(shared: bool, overlap: bool, pace_s: float) -> None:
    def stage(number: int) -> SimulatedStage:
        link = "bus" if shared else f"wire {number}"
        return SimulatedStage(lambda s: 0.01, number, (lambda s: 0.02) if number else None, link)

    setting = Setting(tuple(stage(n) for n in range(3)), overlap)
    report = simulate_batches(setting, [BatchRequest(0.0, 1000, 8)], 1)
    assert report.duration_s / 1000 == pytest.approx(pace_s, rel=0.01)


def test_stages_on_one_core_take_turns() -> None:
    setting = Setting(tuple(SimulatedStage(lambda s: 0.01, n % 2) for n in range(3)))
    report = simulate_batches(setting, [BatchRequest(0.0, 1000, 8)], 1)
    assert report.duration_s / 1000 == pytest.approx(0.02, rel=0.01)


def test_a_core_of_several_stages_does_first_what_is_nearest_to_the_end() -> None:
    setting = Setting(tuple(SimulatedStage(lambda s: 0.01, 0) for _ in range(3)))
    report = simulate_batches(setting, [BatchRequest(0.0, 1, 8)] * 4, 1)
    assert report.latency.mean == pytest.approx((0.03 + 0.06 + 0.09 + 0.12) / 4)


@pytest.mark.parametrize(("times", "pace_s"), [((0.01, 0.01), 0.015), ((0.01, 0.02), 0.025), ((0.005, 0.02), 0.0225)])
def test_cores_that_share_memory_slow_each_other_down_while_both_compute(
    times: tuple[float, float], pace_s: float
) -> None:
    """At half as much more for each other one: a stage of t seconds beside a longer one takes 1.5 t, in which the
    longer one does t of its own work; what it has left then goes undisturbed."""
    stages = [
        SimulatedStage(lambda s, t=t: t, n, contention=lambda s: 0.5)  # type: ignore[misc]
        for n, t in enumerate(times)
    ]
    report = simulate_batches(Setting(tuple(stages)), [BatchRequest(0.0, 1000, 8)], 1)
    assert report.duration_s / 1000 == pytest.approx(pace_s, rel=0.01)
    alone = simulate_batches(Setting(tuple(stages)), [BatchRequest(0.0, 1, 8)], 1)
    assert alone.duration_s == pytest.approx(sum(times))


def test_batches_are_cut_as_the_pipeline_cuts_them() -> None:
    seen: list[Shape] = []
    stages = [SimulatedStage(lambda s: seen.append(s) or 0.01, n) for n in range(2)]  # type: ignore[func-returns-value]
    simulate_batches(Setting(tuple(stages)), [BatchRequest(0.0, 8, 64)])
    assert {(shape.batch, shape.length) for shape in seen} == {(2, 64)}
    assert len(seen) == 2 * 4


def test_energy_and_cost_are_those_of_busy_and_idle_time() -> None:
    setting = equal_stages(2, busy_w=100.0, idle_w=10.0, price_per_h=3.6)
    report = simulate_batches(setting, [BatchRequest(0.0, 9, 8)], 1)
    assert report.duration_s == pytest.approx(0.1)
    assert report.energy_j == pytest.approx(2 * (100 * 0.09 + 10 * 0.01))
    assert report.cost == pytest.approx(2 * 3.6 / 3600 * 0.1)


def test_replicas_are_the_fewest_that_keep_the_goal() -> None:
    found = replicas_needed(generation, 200, 0.3)
    assert found is not None
    count, report = found
    assert report.ttft.p99 <= 0.3 < generation(200 / (count - 1)).ttft.p99
    assert replicas_needed(generation, 200, 0.001, max_replicas=64) is None


def test_a_request_that_does_not_fit_a_cache_row_is_reported() -> None:
    with pytest.raises(StagelineError, match="a request has 30 tokens, a cache row holds 16; set a larger capacity"):
        simulate_generation(equal_stages(1), [TextRequest(0.0, 20, 10)], 2, 16, 8)


def test_micro_batches_cover_the_rows_evenly() -> None:
    seen: list[Shape] = []
    setting = Setting((SimulatedStage(lambda s: seen.append(s) or 0.01, 0),))  # type: ignore[func-returns-value]
    simulate_batches(setting, [BatchRequest(0.0, 10, 8)], 4)
    assert sorted(shape.batch for shape in seen) == [3, 3, 4]

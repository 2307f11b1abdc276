"""Plans for a bundle: what is chosen, what it gives, and why nothing fits."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from llamas import TIED
from stageline.models.errors import StagelineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.planning.cluster import Cluster, Kind, parse_devices
from stageline.runtime.planning.measure import ranges
from stageline.runtime.planning.planner import Planner, device_names
from stageline.runtime.planning.problem import Link
from stageline.runtime.planning.profile import Contention, Machine, MachineProfile, Point
from stageline.runtime.planning.simulate import BatchRequest, simulate_batches
from stageline.runtime.workload import Shape, Workload


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Bundle:
    return Bundle.open(tiny_llama)


def small(memory_mb: float, count: int) -> Cluster:
    """Devices of so much memory, slow enough that work counts more than launching it."""
    base = parse_devices("T4").kinds[0].device
    assert base is not None
    device = base.model_copy(update={"memory_gb": memory_mb / 1e3, "tflops": {"float32": 1e-3}, "launch_us": 0.0})
    kind = Kind("small", device, tuple(f"small:{n}" for n in range(count)))
    return Cluster((kind,), ((parse_devices("2xT4").links[0][0],),))


def test_even_blocks_on_like_devices_are_cut_evenly(tiny_bundle: Path) -> None:
    planner = Planner(Bundle.open(tiny_bundle), small(100, 3), Workload(micro_batch=4, length=16))
    best = planner.best("throughput")
    assert [stage.end - stage.first for stage in best.plan.stages] == [1, 1, 1]
    assert device_names(planner.cluster, best.plan) == [["small:0"], ["small:1"], ["small:2"]]
    assert best.tokens_per_s == pytest.approx(4 * 16 / best.plan.bottleneck_s)


def test_the_plan_gives_what_its_simulation_gives(tiny_bundle: Path) -> None:
    planner = Planner(Bundle.open(tiny_bundle), small(100, 2), Workload(micro_batch=4, length=16))
    best = planner.best("throughput")
    report = simulate_batches(planner.setting(best), [BatchRequest(0.0, 4, 16)] * 500, 4)
    assert report.tokens_per_s == pytest.approx(best.tokens_per_s, rel=0.01)


def test_groups_of_decoding_rows_are_as_many_as_stages(llama: Bundle) -> None:
    planner = Planner(llama, small(100, 3), Workload(slots=6, capacity=128))
    best = planner.best("throughput")
    assert best.shape == Shape(6 // len(best.plan.stages), 1, 64, 1)
    assert best.cycle_s >= best.plan.latency_s * (1 - 1e-9)
    assert best.tokens_per_s == pytest.approx(6 / best.cycle_s)


def test_a_cache_counts_for_memory(llama: Bundle) -> None:
    few, many = (Planner(llama, small(1000, 1), Workload(slots=s, capacity=256)).best("latency").plan for s in (1, 9))
    # 6 layers, 2 heads of 8 for keys and as many for values, 4 bytes each
    assert many.figures[0].memory_bytes - few.figures[0].memory_bytes > 8 * 256 * 6 * 2 * 16 * 4 * 0.99


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_what_cannot_fit_says_what_is_short_and_what_would_fit(llama: Bundle, objective: str) -> None:
    roomy = Planner(llama, small(1000, 1), Workload(slots=8, capacity=512)).best("latency").plan.figures[0].memory_bytes
    limit_mb = roomy * 0.6 / 1e6
    planner = Planner(llama, small(limit_mb, 1), Workload(slots=8, capacity=512))
    with pytest.raises(StagelineError) as error:
        planner.best(objective)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    assert f"blocks 0 to 5 need {roomy / 1e9:.3g} GB on small, which has {limit_mb / 1e3:.3g} GB: " in message
    assert f"short by {roomy * 0.4 / 1e9:.3g} GB" in message
    slots = int(re.search(r"--slots (\d+) instead of 8", message)[1])  # type: ignore[index]
    capacity = int(re.search(r"--capacity (\d+) instead of 512", message)[1])  # type: ignore[index]
    devices = int(re.search(r"(\d+) x small instead of 1", message)[1])  # type: ignore[index]
    for changed, fits in (
        (Planner(llama, small(limit_mb, 1), Workload(slots=slots, capacity=512)), True),
        (Planner(llama, small(limit_mb, 1), Workload(slots=slots + 1, capacity=512)), False),
        (Planner(llama, small(limit_mb, 1), Workload(slots=8, capacity=capacity)), True),
        (Planner(llama, small(limit_mb, 1), Workload(slots=8, capacity=capacity + 64)), False),
        (Planner(llama, small(limit_mb, devices), Workload(slots=8, capacity=512)), True),
    ):
        if fits:
            changed.best("latency")
        else:
            with pytest.raises(StagelineError, match="no plan fits"):
                changed.best("latency")


def test_cores_without_a_profile_are_refused(tiny_bundle: Path) -> None:
    planner = Planner(Bundle.open(tiny_bundle), parse_devices("cpu:0"), Workload())
    with pytest.raises(StagelineError, match="are not known; run: stageline profile"):
        planner.best("throughput")
    with pytest.raises(StagelineError, match="the objective cost needs prices and power"):
        planner.best("cost")


def test_stages_that_slow_each_other_down_are_planned_and_simulated_so(tiny_bundle: Path) -> None:
    """Two stages beside each other take a quarter longer; one alone, or a lone micro-batch, does not."""
    bundle = Bundle.open(tiny_bundle)
    points = tuple(
        Point(threads=1, batch=4, length=16, past=0, first=first, end=end, seconds=0.01 * (end - first), runs=5)
        for first, end in ranges(bundle)
    )
    share = Contention(threads=1, batch=4, length=16, past=0, share=0.25)
    profile = MachineProfile(machine=Machine.here(), handover_s=0.0, points=points, contention=(share,))
    cpus = Cluster((Kind("cpu", None, ("cpu:0", "cpu:1")),), ((Link(),),))
    planner = Planner(bundle, cpus, Workload(micro_batch=4, length=16), profile=profile)
    both, lone = planner.best("throughput"), planner.best("latency")
    assert both.plan.bottleneck_s == pytest.approx(0.02 * 1.25, rel=1e-3)
    assert planner.cut([2, 1]).plan.bottleneck_s == pytest.approx(0.02 * 1.25, rel=1e-3)
    assert lone.plan.latency_s == pytest.approx(0.03, rel=1e-3)
    report = simulate_batches(planner.setting(both), [BatchRequest(0.0, 4, 16)] * 500, 4)
    # While the short stage takes 12.5 ms, the long one does 10 ms of its 20 ms.
    assert report.duration_s / 500 == pytest.approx(0.0125 + 0.01, rel=0.01)


def test_quantised_weights_on_a_cpu_take_what_the_engine_holds(
    export_once: Callable[..., Path],
) -> None:
    """A head that is tied to the table of words is quantised beside it."""
    bundle = Bundle.open(export_once(TIED))
    points = tuple(
        Point(threads=1, batch=1, length=1, past=32, first=first, end=end, seconds=0.01 * (end - first), runs=5)
        for first, end in ranges(bundle)
    )
    profile = MachineProfile(machine=Machine.here(), handover_s=0.0, points=points)
    cpu = Cluster((Kind("cpu", None, ("cpu:0",)),), ((Link(),),))
    full, quantised = (
        Planner(bundle, cpu, Workload(slots=1, capacity=64), dtype, profile=profile)
        .cut([2])
        .plan.figures[0]
        .memory_bytes
        for dtype in ("float32", "int8")
    )
    block_bytes = 32 + 4 + 1  # 32 values share a float32 scale and a zero point

    def held(rows: int, columns: int) -> int:
        """One block more has what the zero points lack of the offsets."""
        return rows * (columns // 32 + 1) * block_bytes

    blocks = 2 * (4 * 128**2 + 3 * 128 * 256)
    quantised_bytes = 2 * (4 * held(128, 128) + 2 * held(256, 128) + held(128, 256)) + held(300, 128)
    assert full - quantised == pytest.approx(4 * blocks - quantised_bytes, abs=4)


def test_pinned_layers_are_kept(llama: Bundle) -> None:
    planner = Planner(llama, small(100, 3), Workload(), layers=(1, 4, 1))
    assert [stage.end - stage.first for stage in planner.best("latency").plan.stages] == [1, 4, 1]


def test_the_second_best_is_another_plan_and_no_better(llama: Bundle) -> None:
    planner = Planner(llama, small(100, 3), Workload())
    best = planner.best("throughput")
    second = planner.second("throughput", best)
    assert second is not None
    assert second.plan.stages != best.plan.stages
    assert second.value("throughput") >= best.value("throughput")

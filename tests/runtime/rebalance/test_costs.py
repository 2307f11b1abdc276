"""The expected time of each use: from the profile of this machine, else in the proportions of a roofline."""

import shutil
from pathlib import Path

import pytest
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import WeightDtype
from stageline.runtime.planning.measure import ranges
from stageline.runtime.planning.profile import Machine, MachineProfile, Point, write_profile
from stageline.runtime.rebalance.costs import use_seconds, work_seconds
from stageline.runtime.stages.lanes import Amount
from stageline.runtime.workload import Shape

SHAPES = [(batch, length) for batch in (1, 4) for length in (4, 8)]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def profiled(bundle: Bundle, machine: Machine, block_s: float = 1e-6) -> None:
    """A profile of one thread: a token takes `block_s` in each block, twice that in the prologue, four times in the
    epilogue."""
    blocks = bundle.manifest.blocks
    points = [
        Point(
            threads=1, batch=batch, length=length, past=0, first=first, end=end, runs=5,
            seconds=block_s * batch * length * (end - first + 2 * (first == 0) + 4 * (end == blocks)),
        )
        for batch, length in SHAPES
        for first, end in ranges(bundle)
    ]  # fmt: skip
    write_profile(bundle, MachineProfile(machine=machine, handover_s=0.0, points=tuple(points)))


def test_the_profile_of_this_machine_tells_the_times(bundle: Bundle) -> None:
    profiled(bundle, Machine.here())
    message = use_seconds(bundle, 1, on_cpu=True)
    assert message(Shape(4, 8)).use_s == pytest.approx([64e-6, 32e-6, 32e-6, 32e-6, 128e-6], rel=0.01)
    done = {"batch": Amount(runs=10, rows=20, tokens=120), "prefill": Amount(0, 0, 0), "decode": Amount(0, 0, 0)}
    work = work_seconds(message, done, past=0)  # ten micro-batches of two rows of six tokens
    assert work.use_s == pytest.approx([240e-6, 120e-6, 120e-6, 120e-6, 480e-6], rel=0.01)


def test_the_profile_of_the_weights_that_run_tells_the_times_or_else_that_of_others(bundle: Bundle) -> None:
    profiled(bundle, Machine.here(), 3e-6)
    kinds: tuple[WeightDtype | None, ...] = (None, "int8")
    for weights in kinds:
        assert use_seconds(bundle, 1, True, weights)(Shape(1, 4)).use_s[1] == pytest.approx(12e-6, rel=0.01)
    profiled(bundle, Machine.here("int8"), 1e-6)
    assert use_seconds(bundle, 1, True, "int8")(Shape(1, 4)).use_s[1] == pytest.approx(4e-6, rel=0.01)
    assert use_seconds(bundle, 1, True)(Shape(1, 4)).use_s[1] == pytest.approx(12e-6, rel=0.01)


@pytest.mark.parametrize("why", ["no profile", "another machine", "other threads", "no CPU"])
def test_without_one_a_roofline_tells_their_proportions(bundle: Bundle, why: str) -> None:
    machine = Machine.here()
    if why != "no profile":
        profiled(bundle, machine.model_copy(update={"cpu": "another"}) if why == "another machine" else machine)
    message = use_seconds(bundle, 2 if why == "other threads" else 1, on_cpu=why != "no CPU")
    prologue, first, second, third, epilogue = message(Shape(4, 8)).use_s
    assert first == second == third > 0
    assert prologue < first  # it only looks up
    assert epilogue < first  # a pooler and a classifier of twelve words' width


def test_kinds_of_work_add_up(bundle: Bundle) -> None:
    message = use_seconds(bundle, 1, on_cpu=False)
    one, other = Amount(3, 6, 48), Amount(2, 2, 8)
    both = work_seconds(message, {"batch": one, "prefill": other}, past=5)
    apart = [work_seconds(message, {"batch": one}, past=5), work_seconds(message, {"prefill": other}, past=5)]
    assert both.use_s == pytest.approx([a + b for a, b in zip(*(work.use_s for work in apart), strict=True)])
    assert Amount(5, 8, 56).since(one) == Amount(2, 2, 8)

"""Measured stages, and the times of uses derived from them."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hasty import hasty_profiles
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.engines import Device, Engine, StageFile, WeightDtype, engine_factory
from stageline.runtime.engines.base import CacheSize
from stageline.runtime.generation.request import Sampling
from stageline.runtime.planning import measure as measuring
from stageline.runtime.planning.cost import UseCost, use_costs
from stageline.runtime.planning.host import bundle_decoder, driver_times_s, host_times
from stageline.runtime.planning.measure import _fitting, measure, ranges, undisturbed
from stageline.runtime.planning.profile import (
    Contention,
    Grid,
    Machine,
    MachineProfile,
    Point,
    read_profile,
    write_profile,
)
from stageline.runtime.planning.timings import Timings, fitted_rates, non_negative
from stageline.runtime.workload import Shape


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def hasty() -> Iterator[None]:
    with hasty_profiles():
        yield


def linear_profile(bundle: Bundle, grid: Grid, weights: WeightDtype | None = None) -> MachineProfile:
    """A machine on which everything takes a time that is bilinear in rows and tokens."""
    points = []
    for shape in grid.shapes():
        rows, tokens = shape.batch, shape.batch * shape.length
        for first, end in ranges(bundle):
            blocks, last = end - first, end == bundle.manifest.blocks
            seconds = 1e-6 * (
                blocks * (5 + 2 * rows + tokens) + (first == 0) * 7 * rows + (first > 0) * 3 + last * tokens
            )
            points.append(
                Point(threads=1, batch=rows, length=shape.length, past=0, first=first, end=end, seconds=seconds, runs=5)
            )
    return MachineProfile(machine=Machine.here(weights), handover_s=1e-5, points=tuple(points))


def timings(bundle: Bundle, profile: MachineProfile) -> Timings:
    parts = bundle.parts()
    return Timings(profile, bundle.manifest, 1, lambda s: use_costs(bundle.manifest, bundle.tensors, parts, s))


def test_times_of_uses_are_derived_from_stages_and_between_shapes(bundle: Bundle) -> None:
    times = timings(bundle, linear_profile(bundle, Grid((1, 4, 8), (2, 16)))).of(Shape(6, 9))
    assert times.use_s[1:-1] == pytest.approx([1e-6 * (5 + 12 + 54)] * 3, rel=1e-6)
    assert times.use_s[0] == pytest.approx(42e-6, rel=1e-6)
    assert times.use_s[-1] == pytest.approx(54e-6, rel=1e-6)
    assert times.later_stage_s == pytest.approx(3e-6, rel=1e-6)
    assert times.stage_s(1, 3) == pytest.approx(sum(times.use_s[2:]) + 3e-6)


def test_the_share_that_stages_take_longer_beside_each_other_is_interpolated(bundle: Bundle) -> None:
    shares = {(1, 4): 0.4, (9, 4): 0.2, (1, 8): 0.1, (9, 8): 0.0}
    contention = tuple(
        Contention(threads=1, batch=batch, length=length, past=0, share=share)
        for (batch, length), share in shares.items()
    )
    profile = linear_profile(bundle, Grid((1, 9), (4, 8))).model_copy(update={"contention": contention})
    found = timings(bundle, profile)
    assert found.of(Shape(1, 4)).contention == pytest.approx(0.4)
    assert found.of(Shape(5, 4)).contention == pytest.approx(0.3)
    assert found.of(Shape(5, 6)).contention == pytest.approx(0.175)
    assert found.of(Shape(50, 4)).contention == pytest.approx(0.2)


def test_the_least_disturbed_try_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    others_s, tries = iter([0.0, 9.0, 10.0, 10.0]), iter(["disturbed", "calm"])
    monkeypatch.setattr("stageline.runtime.planning.measure.others_cpu_s", lambda: next(others_s))
    assert undisturbed(lambda: next(tries))[0] == "calm"


def test_generation_costs_the_host_for_each_step(tiny_llama: Path) -> None:
    step_s, row_s = driver_times_s(Bundle.open(tiny_llama))
    assert 0 <= step_s < 0.05
    assert 0 <= row_s < 0.05
    assert step_s + row_s > 0


def test_a_busy_stage_waits_for_the_host_between_its_steps(tiny_llama: Path) -> None:
    times = host_times(bundle_decoder(Bundle.open(tiny_llama)), 2, 1, Sampling(max_tokens=20), busy_s=0.005)
    assert 0 < times.idle_s < times.step_s - 0.005
    assert times.cpu_s > 0


def test_outside_the_measured_shapes_times_grow_as_the_work_does(bundle: Bundle) -> None:
    measured = timings(bundle, linear_profile(bundle, Grid((1, 8), (4, 16))))
    edge, beyond = measured.of(Shape(8, 16)), measured.of(Shape(32, 16))
    assert beyond.use_s[1] == pytest.approx(4 * edge.use_s[1], rel=0.05)


@pytest.mark.usefixtures("hasty")
def test_each_engine_has_a_profile_of_its_own(bundle: Bundle) -> None:
    profile = measure(bundle, [1], [Grid((1,), (4,))], engine="openvino")
    assert profile.machine.engine == "openvino"
    write_profile(bundle, profile)
    assert read_profile(bundle.path, Machine.here(engine="openvino")) == (profile, None)
    found, warning = read_profile(bundle.path, Machine.here())
    assert found == profile
    assert warning is not None
    assert warning.endswith(f"run stageline profile {bundle.path}")
    assert f"openvino {profile.machine.engine_version}" in warning


@pytest.mark.usefixtures("hasty")
def test_what_is_measured_is_stored_and_read_back(bundle: Bundle) -> None:
    profile = measure(bundle, [1], [Grid((1, 2), (4,))])
    assert {(p.first, p.end) for p in profile.points} == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert {(p.batch, p.length, p.threads) for p in profile.points} == {(1, 4, 1), (2, 4, 1)}
    assert 0 < profile.handover_s < 0.01
    beside = {(c.batch, c.length, c.threads) for c in profile.contention}
    assert beside == ({(1, 4, 1), (2, 4, 1)} if len(allowed_cores()) > 1 else set())
    assert profile.host_step_s == 0  # only of models that generate
    write_profile(bundle, profile)
    assert read_profile(bundle.path, Machine.here()) == (profile, None)
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.mark.usefixtures("hasty")
def test_a_budget_leaves_out_passes_and_the_share_grows_to_the_end(bundle: Bundle) -> None:
    shares: list[float] = []
    steps: list[str] = []
    measure(bundle, [1], [Grid((1,), (4,))], lambda s, step: (shares.append(s), steps.append(step)), budget_s=1e-6)  # type: ignore[func-returns-value]
    assert {step.partition(":")[0] for step in steps} == {"pass 1"}
    assert shares == sorted(shares)
    assert shares[-1] > 0.7


@pytest.mark.parametrize(
    ("budget_s", "passed_s", "done", "fit"),
    [(math.inf, 99.0, 0.5, 3), (45.0, 10.0, 0.5, 2), (45.0, 10.0, 1.0, 3), (45.0, 60.0, 1.0, 1), (45.0, 0.0, 0.0, 3)],
)
def test_as_many_passes_are_made_as_fit(budget_s: float, passed_s: float, done: float, fit: int) -> None:
    assert _fitting(3, budget_s, passed_s, done) == fit


def test_profile_of_another_machine_warns_and_names_both(bundle: Bundle) -> None:
    profile = linear_profile(bundle, Grid((1,), (4,)))
    other = profile.machine.model_copy(update={"cpu": "Another CPU", "cores": 96})
    write_profile(bundle, profile.model_copy(update={"machine": other}))
    found, warning = read_profile(bundle.path, Machine.here())
    assert found.machine == other
    assert warning is not None
    assert str(other) in warning
    assert str(Machine.here()) in warning


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_what_is_timed_is_opened_with_the_weights(
    bundle: Bundle, weights: WeightDtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, WeightDtype | None]] = []

    def factory(name: str) -> Callable[..., Engine]:
        def opens(stage: StageFile, device: Device, cache: CacheSize | None, weights: WeightDtype | None) -> Engine:
            opened.append((stage.file.stem, weights))
            return engine_factory(name)(stage, device, cache, weights)

        return opens

    monkeypatch.setattr(measuring, "engine_factory", factory)
    profile = measure(bundle, [1], [Grid((1,), (4,))], passes=1, quantise=weights)
    assert profile.machine == Machine.here(weights)
    timed = {f"{first}-{end}" for first, end in ranges(bundle)}
    assert {name for name, given in opened if given == weights} >= timed
    feeding = {"0-1", "0-2"}  # what feeds a range is not timed
    assert {name for name, given in opened if given != weights} <= feeding


def test_profiles_of_other_weights_lie_side_by_side(bundle: Bundle) -> None:
    kinds: tuple[WeightDtype | None, ...] = (None, "int8", "int4")
    profiles = [linear_profile(bundle, Grid((1,), (4,)), weights) for weights in kinds]
    assert len({write_profile(bundle, profile) for profile in profiles}) == 3
    for weights, profile in zip(kinds, profiles, strict=True):
        assert read_profile(bundle.path, Machine.here(weights)) == (profile, None)


def test_profiles_from_before_weights_counted_stay_valid(bundle: Bundle) -> None:
    machine = Machine(cpu="A CPU (model 1)", cores=2, engine="onnxruntime", engine_version="1.32.0")
    assert machine.file == "a-cpu-model-1-2-cores-onnxruntime-1-32-0.json"
    profile = linear_profile(bundle, Grid((1,), (4,)))
    file = write_profile(bundle, profile)
    data = json.loads(file.read_text())
    del data["machine"]["weights"]
    file.write_text(json.dumps(data))
    assert read_profile(bundle.path, Machine.here()) == (profile, None)


def test_other_weights_of_this_machine_are_nearer_than_another_machine(bundle: Bundle) -> None:
    profile = linear_profile(bundle, Grid((1,), (4,)))
    here, wanted = Machine.here(), Machine.here("int8")
    elsewhere = wanted.model_copy(update={"cpu": "Another CPU"})
    for machine in (elsewhere.model_copy(update={"weights": None}), elsewhere):
        write_profile(bundle, profile.model_copy(update={"machine": machine}))
        found, warning = read_profile(bundle.path, wanted)
        assert found.machine == machine  # the second, of the right weights, is nearer than the first
        assert warning is not None
        assert f"from another machine ({machine}), not from this one ({wanted})" in warning
    write_profile(bundle, profile)
    found, warning = read_profile(bundle.path, wanted)
    assert found.machine == here
    assert warning == (
        "the profile is for weights that are not quantised, not for int8 weights: times may be far off; "
        f"run stageline profile {bundle.path} --quantise int8"
    )


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_a_model_too_large_to_be_opened_whole_is_measured_in_quarters(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, quantise: WeightDtype | None
) -> None:
    assert (0, 3) in ranges(bundle, quantise)
    monkeypatch.setattr(measuring, "_WHOLE_LIMIT_BYTES", 1000)
    assert set(ranges(bundle, quantise)) == {(0, 1), (1, 2), (2, 3)}


def test_a_missing_or_broken_profile_is_reported_in_one_line(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no profile of any machine; make one with: stageline profile"):
        read_profile(bundle.path, Machine.here())
    with pytest.raises(BundleError, match=r"make one with: stageline profile .* --quantise int4"):
        read_profile(bundle.path, Machine.here("int4"))
    file = write_profile(bundle, linear_profile(bundle, Grid((1,), (4,))))
    data = json.loads(file.read_text())
    data["points"][0]["seconds"] = -1
    file.write_text(json.dumps(data))
    with pytest.raises(
        BundleError, match=r"is not valid \(points.0.seconds: must be above 0.*\); run stageline profile"
    ):
        read_profile(bundle.path, Machine.here())


def test_roofline_is_fitted_to_what_was_measured() -> None:
    def costs(shape: Shape) -> list[UseCost]:
        return [UseCost(0, 0, 0, 0, 0, 0, 0, 0), UseCost(10**9 * shape.batch, 0, 10**8, 0, 0, 0, 0, 0)] * 2

    points = [
        Point(
            threads=1,
            batch=b,
            length=1,
            past=0,
            first=0,
            end=2,
            runs=5,
            seconds=1e-4 + 2 * max(b * 1e9 / 3e11, 1e8 / 2e10),
        )
        for b in (1, 2, 4, 8, 16)
    ]
    rates = fitted_rates(points, costs)
    assert rates.flops_per_s == pytest.approx(3e11, rel=0.02)
    assert rates.bytes_per_s == pytest.approx(2e10, rel=0.02)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_no_other_non_negative_point_is_nearer(unknowns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows, wanted = random.uniform(-1, 1, (unknowns + 3, unknowns)), random.uniform(-1, 1, unknowns + 3)
    found = non_negative(rows, wanted)
    assert (found >= 0).all()
    slope = rows.T @ (rows @ found - wanted)  # at the least, nothing falls where it may still move
    assert (slope > -1e-6).all()
    assert abs(slope @ found) < 1e-6

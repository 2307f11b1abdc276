"""Profiles measured from a page: one thing at a time on a machine, whoever measures, and their errors."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stageline.dashboard.children.benchmarks import Launcher
from stageline.dashboard.children.order import Order
from stageline.dashboard.children.profiles import Profiler, Profiling
from stageline.dashboard.children.turn import Turn
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A bundle whose manifest is no manifest."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    return tmp_path / "broken"


def outcome(profiler: Profiler) -> Profiling | None:
    deadline = time.monotonic() + 60
    while (now := profiler.now()) is not None and now.error is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return now


def test_one_at_a_time_and_why_one_failed_is_one_line(broken: Path, tmp_path: Path) -> None:
    profiler, store = Profiler(Turn()), Store(tmp_path / "bench.sqlite")
    assert profiler.now() is None
    profiler.start(store, broken)
    with pytest.raises(StagelineError, match="broken is being profiled; wait for its end"):
        profiler.start(store, broken, "layers", ["--engine", "openvino"])
    failed = outcome(profiler)
    assert failed is not None
    assert failed.error is not None
    assert "manifest.json" in failed.error
    assert "\n" not in failed.error


def test_a_bundle_that_is_gone_is_not_profiled(tmp_path: Path) -> None:
    with pytest.raises(StagelineError, match="the bundle gone is gone; choose another"):
        Profiler(Turn()).start(Store(tmp_path / "bench.sqlite"), tmp_path / "gone")


def test_none_begins_beside_a_benchmark(filled_store: Path, bundles: Path, tmp_path: Path) -> None:
    done = Store(filled_store).run(Store(filled_store).find("latest"))
    store = Store(tmp_path / "bench.sqlite")
    store.begin(replace(done, id="elsewhere", status="running", measurements=()))
    with pytest.raises(StagelineError, match="run elsewhere is running; wait for its end or cancel it"):
        Profiler(Turn()).start(store, bundles / "llama")


def test_a_benchmark_and_a_profile_wait_for_each_other(
    broken: Path, bundles: Path, tmp_path: Path, ended: Callable[[Launcher], None]
) -> None:
    turn, store = Turn(), Store(tmp_path / "bench.sqlite")
    profiler, launcher = Profiler(turn), Launcher(turn)
    order = Order(bundles / "llama", concurrency="1", seconds=0.2, repeats=1, new_tokens=4)
    profiler.start(store, broken)
    assert turn.taken(store) == "broken is being profiled"
    with pytest.raises(StagelineError, match="broken is being profiled"):
        launcher.start(store, order)
    outcome(profiler)
    run_id = launcher.start(store, order)  # it is not in the store yet
    with pytest.raises(StagelineError, match=f"run {run_id} is running"):
        profiler.start(store, broken)
    launcher.interrupt(run_id)
    ended(launcher)
    assert turn.taken(store) is None

"""Benchmarks started from a page: one at a time, with their errors, on a copy if the cut differs."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stageline.dashboard.children.benchmarks import Launcher
from stageline.dashboard.children.order import Order
from stageline.dashboard.children.turn import Turn, running
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store

Ended = Callable[[Launcher], None]


def test_only_one_runs_at_a_time_and_it_leaves_a_run(bundles: Path, tmp_path: Path, ended: Ended) -> None:
    store, launcher = Store(tmp_path / "bench.sqlite"), Launcher(Turn())
    order = Order(bundles / "llama", concurrency="1, 2", seconds=0.2, repeats=1, new_tokens=4)
    run_id = launcher.start(store, order)
    with pytest.raises(StagelineError, match=f"run {run_id} is running"):
        launcher.start(store, order)
    ended(launcher)
    assert launcher.failure(run_id) is None
    run = store.run(run_id)
    assert (run.status, run.name) == ("done", "llama")
    assert [str(one.load) for one in run.measurements] == ["1 at a time", "2 at a time"]
    assert running(store) == []


def test_one_that_another_process_makes_is_waited_for(filled_store: Path, bundles: Path, tmp_path: Path) -> None:
    done = Store(filled_store).run(Store(filled_store).find("latest"))
    store = Store(tmp_path / "bench.sqlite")
    store.begin(replace(done, id="elsewhere", status="running", measurements=()))
    with pytest.raises(StagelineError, match="run elsewhere is running"):
        Launcher(Turn()).start(store, Order(bundles / "llama"))


def test_why_one_did_not_begin_is_one_line(bundles: Path, tmp_path: Path, ended: Ended) -> None:
    launcher = Launcher(Turn())
    run_id = launcher.start(Store(tmp_path / "bench.sqlite"), Order(bundles / "llama", concurrency="none"))
    ended(launcher)
    failure = launcher.failure(run_id)
    assert failure is not None
    assert "none" in failure
    assert "\n" not in failure


def test_a_bundle_that_is_gone_is_not_measured(tmp_path: Path) -> None:
    launcher = Launcher(Turn())
    with pytest.raises(StagelineError, match="gone is gone; choose another"):
        launcher.start(Store(tmp_path / "bench.sqlite"), Order(tmp_path / "gone"))
    assert launcher.starting() is None


def test_a_run_whose_process_died_runs_no_more_whatever_the_store_says(
    bundles: Path, tmp_path: Path, ended: Ended
) -> None:
    store, turn = Store(tmp_path / "bench.sqlite"), Turn()
    launcher = Launcher(turn)
    run_id = launcher.start(store, Order(bundles / "llama", concurrency="1", seconds=60.0, repeats=1, new_tokens=4))
    deadline = time.monotonic() + 60
    while not running(store):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert turn.runs(store) == [run_id]
    launcher._children[run_id].process.kill()
    ended(launcher)
    assert running(store) == [run_id]
    assert turn.runs(store) == []
    assert turn.taken(store) is None
    assert launcher.failure(run_id) == "it ended with status -9"

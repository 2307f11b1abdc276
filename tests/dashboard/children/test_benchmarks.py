"""Benchmarks started from a page: one at a time, with their errors, on a copy if the cut differs."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from stageline.dashboard.children.benchmarks import Launcher, Order, cut_copy, running
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle, read_manifest

ENDS_WITHIN_S = 90.0


def ended(launcher: Launcher) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_S
    while launcher.starting():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_one_runs_at_a_time_and_it_leaves_a_run(bundles: Path, tmp_path: Path) -> None:
    store, launcher = Store(tmp_path / "bench.sqlite"), Launcher()
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
        Launcher().start(store, Order(bundles / "llama"))


def test_why_one_did_not_begin_is_one_line(tmp_path: Path) -> None:
    launcher = Launcher()
    run_id = launcher.start(Store(tmp_path / "bench.sqlite"), Order(tmp_path / "gone"))
    ended(launcher)
    failure = launcher.failure(run_id)
    assert failure is not None
    assert "no bundle at" in failure
    assert "\n" not in failure


def test_another_cut_is_measured_on_a_copy(bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = (bundles / "llama" / "manifest.json").read_bytes()
    assert cut_copy(bundles / "llama", 2) == bundles / "llama"
    for _ in range(2):  # the second replaces the first
        copy = cut_copy(bundles / "llama", 3)
        assert len(Bundle.open(copy).manifest.stages) == 3
    assert (bundles / "llama" / "manifest.json").read_bytes() == before
    assert len(read_manifest(bundles / "llama").stages) == 2
    assert [folder.name for folder in copy.parent.iterdir()] == ["llama-3-stages"]

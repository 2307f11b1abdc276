"""Profiles measured from a page: one at a time, not beside a benchmark, and their errors."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from stageline.dashboard.children.profiles import Profiler
from stageline.models.errors import StagelineError
from stageline.runtime.bench.store import Store


def test_one_at_a_time_and_why_one_failed_is_one_line(tmp_path: Path) -> None:
    profiler, store = Profiler(), Store(tmp_path / "bench.sqlite")
    assert profiler.now() is None
    profiler.start(store, tmp_path / "gone")
    with pytest.raises(StagelineError, match="gone is being profiled"):
        profiler.start(store, tmp_path / "gone")
    deadline = time.monotonic() + 60
    while (now := profiler.now()) is not None and now.error is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert now is not None
    assert now.error is not None
    assert now.error.startswith("no bundle at")


def test_none_begins_beside_a_benchmark(filled_store: Path, tmp_path: Path) -> None:
    done = Store(filled_store).run(Store(filled_store).find("latest"))
    store = Store(tmp_path / "bench.sqlite")
    store.begin(replace(done, id="elsewhere", status="running", measurements=()))
    with pytest.raises(StagelineError, match="a benchmark is running"):
        Profiler().start(store, tmp_path)

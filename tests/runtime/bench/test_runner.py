"""What a run keeps and reports as it proceeds, of contenders that sleep: progress, far too much load, full disks."""

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import synthetic_runs
from stageline.models.errors import EngineError, StoreError
from stageline.runtime.bench import runner
from stageline.runtime.bench import store as store_module
from stageline.runtime.bench.contenders import CallContender, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED, CANCELLED, CUT, Load, Progress, Run, Slo
from stageline.runtime.bench.store import Store
from stageline.runtime.report.document import document
from stageline.runtime.report.formats import markdown

NO_SLO = Slo()
ITEM = Item((), ((1, 2, 3),), {}, None)


def sleeping(name: str, seconds: float) -> Callable[[], CallContender]:
    """Opens a contender that takes so long for each request, one after the other."""

    def call(items: Sequence[Item]) -> list[RequestOutcome]:
        time.sleep(seconds)
        return [RequestOutcome(time.perf_counter()) for _ in items]

    return lambda: CallContender(name, call, 1)


def begun(store: Store, loads: Sequence[Load], slo: Slo = NO_SLO, seconds: float = 0.3) -> Run:
    """A run of two repeats in the store, about to be carried out."""
    template = synthetic_runs.run(1)
    settings = replace(
        template.settings, loads=tuple(loads), repeats=2, seconds=seconds, warm_up_s=0.1, slo=slo, output_tokens=None
    )
    run = replace(template, settings=settings, measurements=(), status="running", finished=None)
    store.begin(run)
    return run


def test_live_figures_are_of_the_contender_and_load_that_the_step_names(tmp_path: Path) -> None:
    """B13: at each change of load the speed of the new one stood beside the latency of the one before."""
    store, seen = Store(tmp_path / "bench.sqlite"), list[Progress]()
    openers = {"stageline": sleeping("stageline", 0.002), "onnxruntime": sleeping("onnxruntime", 0.004)}
    run = begun(store, [Load("Concurrency", 1), Load("Concurrency", 4)])
    done = runner.bench(run, store, openers, [ITEM], follow=seen.append)
    known = {f"{one.contender}: {one.load}": one.figures["latency_p50_s"].values for one in done.measurements}
    assert len(known) == 4
    of_loads = [progress for progress in seen if ", repeat" in progress.step]
    assert {progress.step.split(",")[0] for progress in of_loads} == set(known)
    for progress in of_loads:
        if "latency_p50_s" in progress.live:
            assert progress.live["latency_p50_s"] in known[progress.step.split(",")[0]]
    firsts = [one for before, one in itertools.pairwise(seen) if "repeat 1" in one.step and one.step != before.step]
    assert [one.live for one in firsts] == [{}] * 4


def test_the_speed_of_a_load_that_just_ended_is_not_reported_as_the_next_ones(tmp_path: Path) -> None:
    """The heartbeat's thread reads the speed while the run's moves on."""
    store = Store(tmp_path / "bench.sqlite")
    state = runner._State(begun(store, [Load("Offline")]), store, Event(), lambda progress: None)
    moving_on = threading.Thread(target=state.at, args=("the next load", {}))

    class Driven:
        @property
        def answered(self) -> int:
            moving_on.start()
            moving_on.join(0.2)
            return 500

    state.at("a load", {"latency_p50_s": 0.1})
    state.driven = Driven(), 0, time.perf_counter() - 1  # type: ignore[assignment]
    state.beat()
    moving_on.join()
    assert (state.progress.step, state.progress.live) == ("the next load", {})


def test_a_run_that_ended_says_so_in_its_progress(tmp_path: Path) -> None:
    """B11: who follows a run in the store sees its end, however it came."""
    store = Store(tmp_path / "bench.sqlite")
    run = begun(store, [Load("Concurrency", 1)])
    runner.bench(run, store, {"stageline": sleeping("stageline", 0.002)}, [ITEM])
    (line,) = store.runs()
    assert (line.status, line.progress.share, line.progress.step) == ("done", 1.0, "done")
    store.delete(run.id)
    stop = Event()
    stop.set()
    store.begin(run)
    runner.bench(run, store, {"stageline": sleeping("stageline", 0.002)}, [ITEM], stop=stop)
    assert (store.run(run.id).status, store.run(run.id).progress.step) == ("cancelled", "cancelled")
    store.delete(run.id)
    store.begin(run)

    def broken() -> CallContender:
        raise EngineError("no such engine")

    with pytest.raises(EngineError):
        runner.bench(run, store, {"stageline": broken}, [ITEM])
    (line,) = store.runs()
    assert (line.status, line.error, line.progress.step) == ("failed", "no such engine", "failed")
    assert line.progress.share < 1


def test_repeats_far_over_saturation_end_early_and_their_requests_are_counted_and_said_to_be_cut(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "bench.sqlite")
    run = begun(store, [Load("Rate", rate_per_s=400.0)], Slo(latency_s=0.05))  # of at most 50/s
    openers = {"stageline": sleeping("stageline", 0.001), "onnxruntime": sleeping("onnxruntime", 0.02)}
    done = runner.bench(run, store, openers, [ITEM])
    ours, theirs = done.measurements
    assert ours.requests == theirs.requests == 2 * 120
    assert ours.failures == ()
    requests = store.requests(run.id, 1)
    cut = int((requests.status == CANCELLED).sum())
    assert cut > 120
    assert cut + int((requests.status == ANSWERED).sum()) == 240
    (failures,) = theirs.failures
    assert (failures.kind, failures.count) == (CUT, cut)
    assert "of 120 requests 0.3 s after the last arrival; far more arrive than it answers" in failures.sample
    assert any(
        f"{cut} of 240 requests were not answered: {cut} cut, such as: onnxruntime" in one for one in theirs.notes
    )
    assert requests.latency_s[requests.status == CANCELLED].min() > 0.3
    assert theirs.figures["failed_share"].mean == pytest.approx(cut / 240)
    assert "latency_p50_s" not in theirs.figures  # more than half took longer than is known
    shown = markdown(document([done]), "report")
    alone = markdown(document([replace(done, measurements=(theirs,))]), "report")
    assert "| latency p50 | - |" in alone
    assert "p50 is not known" in alone
    assert f"p50 is not known: {cut} of 240 requests had no answer in time" in shown
    assert "No comparison with onnxruntime at this load: too few requests were answered in time." in shown


class Counting:
    """Meters of a machine that takes 6 J between two readings."""

    notes: tuple[str, ...] = ()
    measures_energy, has_gpu, read = True, False, 0.0

    def energy_j(self) -> float:
        self.read += 6.0
        return self.read

    def close(self) -> None: ...


def test_energy_is_of_the_tokens_that_came_to_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Meters", Counting)
    store = Store(tmp_path / "bench.sqlite")
    run = begun(store, [Load("Rate", rate_per_s=400.0)])
    done = runner.bench(run, store, {"stageline": sleeping("stageline", 0.02)}, [ITEM])
    figures, requests = done.measurements[0].figures, store.requests(run.id, 0)
    answered = [int(((requests.repeat == n) & (requests.status == ANSWERED)).sum()) for n in (0, 1)]
    assert max(answered) < 60
    wanted = [joules / (3 * count) for joules, count in zip(figures["energy_j"].values, answered, strict=True)]
    assert figures["energy_per_token_j"].values == pytest.approx(wanted)


def test_a_disk_that_fills_up_during_a_run_loses_nothing_that_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "bench.sqlite")
    run = begun(store, [Load("Concurrency", 1), Load("Concurrency", 64)])
    connect = sqlite3.connect

    def full(*given: Any, **named: Any) -> sqlite3.Connection:
        db = connect(*given, **named)
        db.execute("PRAGMA max_page_count = 1")  # SQLite takes the pages it has for the most
        return db

    def follow(progress: Progress) -> None:
        if progress.step.startswith("stageline: 64 at a time"):
            monkeypatch.setattr(store_module.sqlite3, "connect", full)

    with pytest.raises(StoreError, match="cannot grow: the disk is full; free some space") as error:
        runner.bench(run, store, {"stageline": sleeping("stageline", 0.0)}, [ITEM], follow=follow)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    (kept,) = store.run(run.id).measurements
    assert str(kept.load) == "1 at a time"
    requests = store.requests(run.id, 0)
    assert len(requests) == kept.requests
    assert np.isfinite(requests.latency_s).all()
    store.put(replace(synthetic_runs.run(2)))
    assert len(store.runs()) == 2

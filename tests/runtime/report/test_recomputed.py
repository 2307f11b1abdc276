"""Each statement of a report against an independent computation from the requests that its store keeps."""

import heapq
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import synthetic_runs
from stageline.exporter.commands.cli import main
from stageline.runtime.bench import runner
from stageline.runtime.bench.client import DriveResult
from stageline.runtime.bench.confidence import Ratio
from stageline.runtime.bench.contenders import Contender
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import (
    ANSWERED,
    CANCELLED,
    CUT,
    FAILED,
    OURS,
    Failures,
    Figure,
    Load,
    Measurement,
    Requests,
    Run,
    Slo,
)
from stageline.runtime.bench.store import Store
from stageline.runtime.report import statements, wording

pytest.importorskip("scipy.stats")
recomputed = pytest.importorskip("recomputed")

SERVERS = {OURS: (4, 0.020), "onnxruntime": (1, 0.008), "torch": (2, 0.070)}
"""How many requests a contender answers at a time, and the mean time of each in seconds."""
SLO = Slo(latency_s=0.08, ttft_s=0.05, tpot_s=0.02)


@dataclass
class Named:
    """A contender that only has a name: `QueueClient` answers for it."""

    name: str
    pipeline: None = None

    def close(self) -> None: ...


class QueueClient:
    """The load generator's place in the runner: first come, first served at `SERVERS`, on a clock of its own. One
    request in fifty fails."""

    def __init__(self, contender: Contender, items: Sequence[Item], stop: Event, bound_s: float) -> None:
        self.contender, self.answered = contender, 0
        self._servers, self._mean_s = SERVERS[contender.name]
        self._draw = np.random.default_rng(zlib.crc32(contender.name.encode()))

    def closed_loop(self, concurrency: int, seconds: float, repeat: int = 0) -> DriveResult:
        free, users, rows = [0.0] * self._servers, [0.0] * concurrency, []
        while users[0] < seconds:
            arrived = heapq.heappop(users)
            rows.append(self._served(arrived, free))
            heapq.heappush(users, rows[-1][0] + rows[-1][2])
        return self._result(rows, repeat)

    def open_loop(
        self,
        arrivals_s: Sequence[float],
        repeat: int = 0,
        ceiling: int | None = None,
        items: Sequence[Item] = (),
        give_up_s: float = math.inf,
    ) -> DriveResult:
        free = [0.0] * self._servers
        return self._result([self._served(at, free) for at in arrivals_s], repeat, arrivals_s[-1] + give_up_s)

    def _served(self, arrived: float, free: list[float]) -> tuple[float, float, float]:
        """Intended arrival, first token and latency."""
        began = max(arrived, heapq.heappop(free))
        took = self._mean_s * float(self._draw.lognormal(-0.02, 0.2))
        heapq.heappush(free, began + took)
        return arrived, began + 0.3 * took - arrived, began + took - arrived

    def _result(self, rows: list[tuple[float, float, float]], repeat: int, until: float = math.inf) -> DriveResult:
        intended, first, latency = np.array(sorted(rows)).T
        count, draw = len(intended), self._draw
        cut = intended + latency > until
        failed = (draw.random(count) < 0.02) & ~cut
        latency = np.where(cut, until - intended, latency)
        requests = Requests(
            np.full(count, repeat, np.uint16), intended, np.zeros(count, np.float32),
            np.where(failed | cut, np.nan, first).astype(np.float32), latency.astype(np.float32),
            draw.integers(5, 60, count).astype(np.uint32),
            np.where(failed | cut, 0, draw.integers(1, 40, count)).astype(np.uint32),
            np.select([failed, cut], [FAILED, CANCELLED], ANSWERED).astype(np.uint8),
        )  # fmt: skip
        began_at = perf_counter()
        failures = [Failures("odd", int(failed.sum()), "odd"), Failures(CUT, int(cut.sum()), "the queue grows")]
        ended_at = began_at + float((intended + latency).max())
        return DriveResult(began_at, ended_at, requests, failures=tuple(one for one in failures if one.count))


def carried_out(folder: Path, loads: tuple[Load, ...], sweep: Load | None = None) -> tuple[Run, Store]:
    """A run of three contenders, made by the runner and kept in a store."""
    store, template = Store(folder / "bench.sqlite"), synthetic_runs.run(1)
    settings = replace(
        template.settings, loads=loads, repeats=4, seconds=3.0, slo=SLO, baselines=("onnxruntime", "torch"), sweep=sweep
    )
    run = replace(template, settings=settings, measurements=(), status="running", finished=None)
    store.begin(run)
    openers = {name: partial(Named, name) for name in SERVERS}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "Client", QueueClient)
        return runner.bench(run, store, openers, [Item((), ((1,),), {}, 24)]), store


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Store]:
    """A sweep."""
    return carried_out(tmp_path_factory.mktemp("swept"), (), Load("Rate"))


def test_every_statement_of_a_sweeps_report_follows_from_its_stored_requests(swept: tuple[Run, Store]) -> None:
    check = recomputed.Check(*swept)
    assert check.wrong == []
    assert check.checked > 500
    for said in ("The knee of stageline is at", "The largest rate at which onnxruntime keeps the SLO", "p99 needs 100"):
        assert said in check.text


def test_what_was_cut_does_not_make_a_report_look_better(tmp_path: Path) -> None:
    """At 200/s, of which torch answers 28."""
    check = recomputed.Check(*carried_out(tmp_path, (Load("Rate", rate_per_s=200.0), Load("Concurrency", 4))))
    assert check.wrong == []
    assert "| latency p50 |" in check.text
    assert re.search(r"p50 is not known: \d+ of 2,400 requests had no answer in time", check.text)
    assert re.search(r"torch, Rate 200/s: \d+ of 2400 requests were not answered: \d+ cut", check.text)


Plant = Callable[[pytest.MonkeyPatch, Run], Run]


def figure(name: str, factor: float) -> Plant:
    """A figure of our second measurement is off by a little."""

    def plant(_: pytest.MonkeyPatch, run: Run) -> Run:
        place = [number for number, one in enumerate(run.measurements) if one.contender == OURS][1]
        return _changed(run, place, lambda one: _with(one, name, factor))

    return plant


def _changed(run: Run, place: int, change: Callable[[Measurement], Measurement]) -> Run:
    kept = list(run.measurements)
    kept[place] = change(kept[place])
    return replace(run, measurements=tuple(kept))


def _with(one: Measurement, name: str, factor: float) -> Measurement:
    old = one.figures[name]
    return replace(
        one, figures={**one.figures, name: Figure.of(old.unit, old.better, [factor * v for v in old.values])}
    )


def mixed_loads(_: pytest.MonkeyPatch, run: Run) -> Run:
    """Bug B3: latency of one load beside the throughput of another."""
    ours = [number for number, one in enumerate(run.measurements) if one.contender == OURS]
    other = run.measurements[ours[2]].figures["latency_p50_s"]
    return _changed(run, ours[0], lambda one: replace(one, figures={**one.figures, "latency_p50_s": other}))


def inverted_ratio(patched: pytest.MonkeyPatch, run: Run) -> Run:
    """Bug B2: a baseline that is twice as fast is said to be half as fast."""
    between = Ratio.between
    patched.setattr(statements.Ratio, "between", lambda theirs, ours: between(ours, theirs))
    return run


def worst_baseline(patched: pytest.MonkeyPatch, run: Run) -> Run:
    best_first = statements.best_first
    patched.setattr(statements, "best_first", lambda *given: best_first(*given)[::-1])
    return run


def percentile_of_a_small_sample(patched: pytest.MonkeyPatch, run: Run) -> Run:
    patched.setattr(wording, "missing", lambda *given: None)
    return run


def next_load_as_knee(patched: pytest.MonkeyPatch, run: Run) -> Run:
    _patch_capacities(patched, "knee", lambda knee: knee and replace(knee, concurrency=2 * knee.concurrency))
    return run


def next_rate_as_best(patched: pytest.MonkeyPatch, run: Run) -> Run:
    _patch_capacities(patched, "best", lambda best: best and replace(best, rate_per_s=1.1 * best.rate_per_s))
    return run


def _patch_capacities(patched: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    capacities = statements.capacities
    patched.setattr(
        statements,
        "capacities",
        lambda *given: [replace(one, **{name: change(getattr(one, name))}) for one in capacities(*given)],
    )


@pytest.mark.parametrize(
    "plant",
    [
        figure("requests_per_s", 1.02), figure("tokens_per_s", 1.02), figure("goodput_per_s", 0.98),
        figure("slo_share", 0.99), figure("latency_p50_s", 1.02), figure("latency_p90_s", 0.98),
        figure("ttft_p50_s", 1.02), figure("tpot_p50_s", 1.02), mixed_loads, inverted_ratio, worst_baseline,
        percentile_of_a_small_sample, next_load_as_knee, next_rate_as_best,
    ],
)  # fmt: skip
def test_an_error_that_is_planted_is_found(
    plant: Plant, swept: tuple[Run, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = swept
    assert recomputed.Check(plant(monkeypatch, run), store).wrong


@pytest.mark.slow
def test_every_statement_of_a_real_sweep_follows_from_its_stored_requests(tiny_llama: Path, tmp_path: Path) -> None:
    asked = (
        "--sweep", "--slo", "latency=100ms", "--baseline", "onnxruntime", "--seconds", "0.25", "--warm-up", "0.1",
        "--repeats", "2", "--lengths", "4-12", "--new-tokens", "2-6",
    )  # fmt: skip
    path = tmp_path / "bench.sqlite"
    assert main(["bench", str(tiny_llama), *asked, "--store", str(path)]) == 0
    store = Store(path)
    check = recomputed.Check(store.run(store.find("latest")), store)
    assert check.wrong == []
    assert check.checked > 100

"""Shared by pages that show recorded runs: the store, cached until its file changes, and the choice of runs."""

import time
from pathlib import Path

import streamlit as st
from stageline.dashboard.figures import runs as results
from stageline.dashboard.figures.distribution import Spread, spread
from stageline.dashboard.figures.timeline import Table
from stageline.dashboard.settings import DashboardSettings, example_bundle
from stageline.dashboard.views.common import code, empty, plain
from stageline.models.errors import StagelineError
from stageline.runtime.bench.records import Run, RunLine
from stageline.runtime.bench.store import Store

RECENT = 200
"""Runs that lists offer; older ones have a link."""


def store() -> Store:
    """The store that the dashboard was started with."""
    return Store(DashboardSettings.given().store)


def lines() -> list[RunLine]:
    """All runs, newest first."""
    path = store().path
    return _lines(str(path), _changed(path))


def run_of(run_id: str) -> Run:
    """A run with its measurements."""
    path = store().path
    return _run(str(path), _changed(path), run_id)


def spread_of(runs: list[Run], measurements: list[int], names: list[str]) -> Spread:
    """Charts' rows of one measurement of each run. Its requests no longer change; only the rows are cached."""
    which = tuple((run.id, run.created, number) for run, number in zip(runs, measurements, strict=True))
    return _spread(str(store().path), which, tuple(names))


def table_of(run: Run, measurement: int) -> Table:
    """The timeline of a measurement; it no longer changes."""
    return _table(str(store().path), run.id, run.created, measurement)


def named_runs(key: str) -> list[str]:
    """The ids named by the query parameter `key`, also by beginnings and `latest`; unknown ones show a warning."""
    found = []
    for name in st.query_params.get(key, "").split(","):
        if name:
            try:
                found.append(store().find(name))
            except StagelineError as error:
                st.warning(plain(str(error)), icon=":material/link_off:")
    return found


def choices(all_lines: list[RunLine], wanted: list[str]) -> dict[str, str]:
    """Labels by id of the newest runs with measurements, and of wanted ones."""
    measured, now_s = [line for line in all_lines if line.headlines], time.time()
    older = [line for line in measured[RECENT:] if line.id in wanted]
    return {line.id: results.label(line, now_s) for line in (*measured[:RECENT], *older)}


def differences_caption(before: Run, after: Run) -> None:
    """Show what differs between two runs apart from their figures."""
    found = "; ".join(results.differences(before, after))
    st.caption(f"What differs: {found}." if found else "Same plan, settings, machine and versions.")


def no_runs() -> None:
    """The empty state of pages that need a recorded run."""
    empty(
        "No benchmark run yet",
        "A run measures a bundle's pipeline: throughput, latency, and where the time goes. Start one on the page "
        "**Run a benchmark**, or in a terminal:",
        [f"stageline bench {example_bundle(DashboardSettings.given().bundles)}"],
    )
    st.caption(f"Runs are read from {code(str(store().path))}; `stageline dashboard --store FILE` reads another store.")


def _changed(path: Path) -> tuple[float, ...]:
    """Modification times of the store's files: caches hold until they change, once they are two seconds old."""
    times = []
    for name in (path.name, f"{path.name}-wal"):
        try:
            times.append(path.with_name(name).stat().st_mtime_ns / 1e9)
        except OSError:
            times.append(0.0)
    fresh = time.time() - max(times) < 2.0
    return (*times, time.time()) if fresh else tuple(times)


@st.cache_resource(max_entries=4, show_spinner=False)
def _lines(path: str, changed: tuple[float, ...]) -> list[RunLine]:
    return Store(path).runs()


@st.cache_resource(max_entries=32, show_spinner=False)
def _run(path: str, changed: tuple[float, ...], run_id: str) -> Run:
    return Store(path).run(run_id)


@st.cache_resource(max_entries=32, show_spinner="Reading requests")
def _spread(path: str, which: tuple[tuple[str, float, int], ...], names: tuple[str, ...]) -> Spread:
    read = {one: Store(path).requests(one[0], one[2]) for one in which}
    return spread(names, [read[one] for one in which])


@st.cache_resource(max_entries=8, show_spinner="Reading the timeline")
def _table(path: str, run_id: str, created: float, measurement: int) -> Table:
    return Table.of(Store(path).timeline(run_id, measurement))

"""What pages share that show recorded runs: the store, remembered while its file stays, and choosing runs."""

import time
from pathlib import Path

import streamlit as st
from stageline.dashboard.figures import runs as results
from stageline.dashboard.figures.distribution import Spread, spread
from stageline.dashboard.figures.timeline import Table
from stageline.dashboard.settings import DashboardSettings
from stageline.dashboard.views.common import empty
from stageline.models.errors import StagelineError
from stageline.runtime.bench.records import Run, RunLine
from stageline.runtime.bench.store import Store

RECENT = 200
"""Runs that lists offer to choose from; older ones are reached by their link."""


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
    """The requests of a measurement of each run, for charts. They no longer change; only what follows is kept."""
    which = tuple((run.id, run.created, number) for run, number in zip(runs, measurements, strict=True))
    return _spread(str(store().path), which, tuple(names))


def table_of(run: Run, measurement: int) -> Table:
    """The timeline of a measurement, which no longer changes."""
    return _table(str(store().path), run.id, run.created, measurement)


def named_runs(key: str) -> list[str]:
    """The ids that the query parameter `key` names, beginnings and `latest` included; what is not there is told."""
    found = []
    for name in st.query_params.get(key, "").split(","):
        if name:
            try:
                found.append(store().find(name))
            except StagelineError as error:
                st.warning(str(error), icon=":material/link_off:")
    return found


def choices(all_lines: list[RunLine], wanted: list[str]) -> dict[str, str]:
    """Ids of the newest runs that measured something, and of those wanted, with their labels."""
    measured, now_s = [line for line in all_lines if line.headlines], time.time()
    older = [line for line in measured[RECENT:] if line.id in wanted]
    return {line.id: results.label(line, now_s) for line in (*measured[:RECENT], *older)}


def no_runs() -> None:
    """The empty state of pages that need a recorded run."""
    empty(
        "No benchmark run yet",
        "A run measures a bundle's pipeline: throughput, latency, and where the time goes. Start one on the page "
        "**Run a benchmark**, or in a terminal:",
        ["stageline bench bundles/minilm"],
    )
    st.caption(f"Runs are read from `{store().path}`; `stageline dashboard --store FILE` reads another store.")


def _changed(path: Path) -> tuple[float, ...]:
    """Times of the store's files: what is remembered holds while they stay, once they have for two seconds."""
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

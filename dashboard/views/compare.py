"""The Compare page: runs side by side, with confidence."""

import csv
import io
import json
import time

import streamlit as st
from stageline.dashboard.charts import runs as charts
from stageline.dashboard.figures import runs as results
from stageline.dashboard.views.common import empty, page
from stageline.dashboard.views.recorded import (
    choices,
    differences_caption,
    lines,
    named_runs,
    no_runs,
    run_of,
    spread_of,
)
from stageline.runtime import words
from stageline.runtime.bench.compare import incomparable
from stageline.runtime.bench.records import Measurement, Run, RunLine

_MAX_RUNS = 6
_TIMES = {"latency_s": "latency (ms)", "ttft_s": "TTFT (ms)", "tpot_s": "TPOT (ms)"}


@page("Compare", "Runs side by side: figures with confidence intervals, percentiles, distributions.")
def show() -> None:
    """Draw the page."""
    found = lines()
    wanted = named_runs("runs")
    known = choices(found, wanted)
    if not known:
        no_runs()
        return
    default = [one for one in wanted if one in known] or _last_two(list(known), found)
    chosen = st.multiselect(
        "Runs: the others are compared with the first",
        list(known),
        default[:_MAX_RUNS],
        format_func=lambda one: known[one],
        max_selections=_MAX_RUNS,
        key=f"runs {','.join(default)}",
    )
    st.query_params["runs"] = ",".join(chosen)
    if len(chosen) < 2:
        empty("Choose two runs", "Pick at least two above, ideally of the same bundle before and after a change.")
        return
    runs = [run_of(one) for one in chosen]
    keys = results.common_loads(runs)
    if not keys:
        st.info("These runs have no load in common, so they cannot be compared.", icon=":material/info:")
        return
    key = st.selectbox("Measurement", keys, format_func=lambda one: f"{one[0]}, {one[1]}", key="measurement")
    measured = [results.measurement_of(run, key) for run in runs]
    names = _names(runs)
    _figures(runs, key, names)
    _ladders([one for _, one in measured], names)
    _requests(runs, [number for number, _ in measured], names)
    _download(runs)


def _last_two(ids: list[str], found: list[RunLine]) -> list[str]:
    """The newest run, preceded by the one to compare it with."""
    newest = next(line for line in found if line.id == ids[0])
    before = results.earlier(found, newest)
    return [before.id, newest.id] if before and before.id in ids else [newest.id]


def _names(runs: list[Run]) -> list[str]:
    """Short distinct names of the runs, in order."""
    return [f"{chr(65 + n)}: {results.short(run.bundle)} {results.tag(run.id)}" for n, run in enumerate(runs)]


def _figures(runs: list[Run], key: tuple[str, str], names: list[str]) -> None:
    threshold = st.number_input(
        "Margin (%): changes within it are none", 0.0, 100.0, 5.0, 1.0, key="threshold", width=340
    )
    for number, run in enumerate(runs[1:], start=1):
        st.subheader(f"{names[0]} → {names[number]}", anchor=False)
        reason = incomparable(runs[0], run)
        if reason is not None:
            st.info(f"Not compared: {reason}.", icon=":material/compare:")
            continue
        found = results.changes(runs[0], run, key, threshold / 100)
        worse = [results.figure_label(one.figure) for one in found if one.verdict == "worse"]
        better = [results.figure_label(one.figure) for one in found if one.verdict == "better"]
        if worse:
            st.warning(f"Worse: {', '.join(worse)}.", icon=":material/trending_down:")
        if better:
            st.success(f"Better: {', '.join(better)}.", icon=":material/trending_up:")
        st.dataframe(results.change_table(found), hide_index=True, key=f"changes {number}", height="content")
        differences_caption(runs[0], run)


def _ladders(measured: list[Measurement], names: list[str]) -> None:
    known = [what for what in _TIMES if all(one.ladders.get(what) for one in measured)]
    if not known:
        return
    st.subheader("Percentiles", anchor=False)
    what = known[0]
    if len(known) > 1:
        words_of = {"latency_s": "Latency", "ttft_s": "TTFT", "tpot_s": "TPOT"}
        picked = st.segmented_control(
            "Time", known, default=what, required=True, format_func=lambda one: words_of[one], key="ladder",
            label_visibility="collapsed",
        )  # fmt: skip
        what = str(picked or what)
    rows = [row for name, one in zip(names, measured, strict=True) for row in results.ladder_rows(name, one, what)]
    st.vega_lite_chart(charts.ladder(rows, _TIMES[what], names), width="stretch", key="chart-ladder")


def _requests(runs: list[Run], numbers: list[int], names: list[str]) -> None:
    found = spread_of(runs, numbers, names)
    if not any(found.counts):
        return
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Distribution", anchor=False)
        st.vega_lite_chart(charts.histogram(found.histogram, names), width="stretch", key="chart-histogram")
    with right:
        st.subheader("Over time", anchor=False)
        st.vega_lite_chart(charts.over_time(found.over_time, names), width="stretch", key="chart-over-time")
    st.caption(f"Of {' and '.join(words.counted(count, 'request') for count in found.counts)}.")


def _download(runs: list[Run]) -> None:
    rows = results.flat_rows(runs)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"])
    writer.writeheader()
    writer.writerows(rows)
    stamp = time.strftime("%Y%m%d-%H%M")
    with st.container(horizontal=True):
        st.download_button(
            "Download CSV",
            text.getvalue(),
            f"stageline-{stamp}.csv",
            "text/csv",
            icon=":material/download:",
            on_click="ignore",
        )
        st.download_button(
            "Download JSON",
            json.dumps(rows, indent=1),
            f"stageline-{stamp}.json",
            "application/json",
            icon=":material/download:",
            on_click="ignore",
        )

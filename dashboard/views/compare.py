"""The Compare page: runs side by side, the verdict first, with confidence."""

import csv
import io
import json
import time

import streamlit as st
from stageline.dashboard.figures import runs as results
from stageline.dashboard.views import address
from stageline.dashboard.views.common import draw, empty, page, plain
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
from stageline.runtime.bench.compare import MARGIN, compare, incomparable, overall
from stageline.runtime.bench.files import plain_cell
from stageline.runtime.bench.records import Measurement, Run, RunLine
from stageline.runtime.report import charts, rows, sentences, statements, wording

_MAX_RUNS = 6
_TIMES = {"latency_s": "Latency", "ttft_s": "TTFT", "tpot_s": "TPOT"}
_ICONS = {"worse": ":material/trending_down:", "better": ":material/trending_up:", "same": ":material/equal:",
          "undecided": ":material/question_mark:"}  # fmt: skip


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
    named = {f"{contender}, {load}": (contender, load) for contender, load in keys}
    address.start("measurement", "measurement", list(named), next(iter(named)))
    shown = str(st.selectbox("Measurement", list(named), key="measurement"))
    address.keep("measurement", shown, next(iter(named)))
    key = named[shown]
    measured = [results.measurement_of(run, key) for run in runs]
    names = _names(runs)
    _figures(runs, key, names)
    _curves(runs, names, key)
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
    address.restore_number("margin", "margin", 100 * MARGIN, float)
    st.session_state["margin"] = min(max(st.session_state["margin"], 0.0), 100.0)
    percent = st.number_input("Margin (%): changes within it are none", 0.0, 100.0, step=1.0, key="margin", width=340)
    address.keep("margin", f"{percent:g}", f"{100 * MARGIN:g}")
    for number, run in enumerate(runs[1:], start=1):
        st.subheader(f"{plain(names[0])} → {plain(names[number])}", anchor=False)
        reason = incomparable(runs[0], run)
        if reason is not None:
            st.info(f"Not compared: {plain(reason)}.", icon=":material/compare:")
            continue
        found = compare(runs[0], run, percent / 100)
        verdict = overall(found)
        shown = {"worse": st.warning, "better": st.success}.get(verdict, st.info)
        named = {one: [c.figure for c in found if c.contender == "stageline" and c.verdict == one] for one in _ICONS}
        figures = ", ".join(dict.fromkeys(map(wording.label, named[verdict]))) if verdict in ("worse", "better") else ""
        shown(f"{wording.VERDICTS[verdict]}{f': {figures}' if figures else ''}.", icon=_ICONS[verdict])
        st.dataframe(results.matrix(found), hide_index=True, key=f"matrix {number}", height="content")
        st.caption(f"{key[0]}, {key[1]}:")
        table = results.change_table([one for one in found if (one.contender, one.load) == key])
        st.dataframe(table, hide_index=True, key=f"changes {number}", height="content")
        differences_caption(runs[0], run)


def _curves(runs: list[Run], names: list[str], key: tuple[str, str]) -> None:
    """Curve over curve: one contender of all runs, each run in its colour."""
    drawn = [
        {**row, "contender": name}
        for run, name in zip(runs, names, strict=True)
        for row in rows.curve_rows(run, "latency_p50")
        if row["contender"] == key[0]
    ]
    units = {statements.throughput_unit(run) for run in runs}
    if not drawn or len(units) > 1:
        return
    st.subheader("Throughput and latency", anchor=False)
    unit = units.pop()
    chart = charts.curve(drawn, unit, "Latency p50", None, names)
    draw(chart, "chart-curves", sentences.of_curve(drawn, unit, "Latency p50"))
    st.caption(f"{key[0]}. Labels are loads; lines through points are 95 % intervals up to ±100 %.")


def _ladders(measured: list[Measurement], names: list[str]) -> None:
    known = [what for what in _TIMES if all(one.ladders.get(what) for one in measured)]
    if not known:
        return
    st.subheader("Percentiles", anchor=False)
    what = known[0]
    if len(known) > 1:
        address.start("time", "ladder", known, what)
        what = str(st.segmented_control(
            "Time", known, required=True, format_func=lambda one: _TIMES[one], key="ladder",
            label_visibility="collapsed",
        ))  # fmt: skip
        address.keep("time", what, known[0])
    drawn = [row for name, one in zip(names, measured, strict=True) for row in rows.ladder_rows(name, one, what)]
    named = _TIMES[what]
    draw(charts.ladder(drawn, named, names), "chart-ladder", sentences.of_lines(drawn, f"{named} by percentile"))


def _requests(runs: list[Run], numbers: list[int], names: list[str]) -> None:
    found = spread_of(runs, numbers, names)
    if not any(found.counts):
        return
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Distribution", anchor=False)
        draw(charts.histogram(found.histogram, names), "chart-histogram",
             sentences.of_lines(found.histogram, "Shares of requests by latency"))  # fmt: skip
    with right:
        st.subheader("Over time", anchor=False)
        draw(charts.over_time(found.over_time, names), "chart-over-time",
             sentences.of_lines(found.over_time, "Latency during the measurement"))  # fmt: skip
    st.caption(f"Of {' and '.join(words.counted(count, 'request') for count in found.counts)}.")


def _download(runs: list[Run]) -> None:
    flat = rows.flat_rows(runs)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else ["run"])
    writer.writeheader()
    writer.writerows({name: plain_cell(value) for name, value in row.items()} for row in flat)
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
            json.dumps(flat, indent=1),
            f"stageline-{stamp}.json",
            "application/json",
            icon=":material/download:",
            on_click="ignore",
        )

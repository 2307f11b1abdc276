"""The Timeline page: a Gantt chart of the stages of a recorded run."""

import streamlit as st
from stageline.dashboard.charts import timeline as charts
from stageline.dashboard.figures import runs as results
from stageline.dashboard.figures import timeline
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views.common import empty, page
from stageline.dashboard.views.recorded import choices, lines, named_runs, no_runs, run_of, store, table_of
from stageline.runtime import words
from stageline.runtime.bench.records import Run


@page("Timeline", "What each stage did and when, micro-batch by micro-batch, and where it waited.")
def show() -> None:
    """Draw the page."""
    wanted = named_runs("run")
    known = choices(lines(), wanted)
    if not known:
        no_runs()
        return
    ids = list(known)
    start = ids.index(wanted[0]) if wanted and wanted[0] in known else 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        run_id = st.selectbox("Run", ids, start, format_func=lambda one: known[one], key=f"run {ids[start]}", width=420)
        run = run_of(run_id)
        place = _measurement(run)
    st.query_params["run"] = run_id
    table = None if place is None else table_of(run, place)
    if table is None or not table.spans:
        empty(
            "This run has no timeline",
            "Only a pipeline in the benchmark's own process is recorded; imported runs may lack a timeline.",
            [f"stageline bench {as_typed(run.bundle)}"],
        )
        return
    _gantt(table, f"{run.id} {place}")


def _measurement(run: Run) -> int | None:
    """The number of the chosen measurement, among those with a timeline."""
    recorded = store().timelines(run.id)
    known = [n for n, one in enumerate(run.measurements) if one.stages and n in recorded]
    if not known:
        return None
    full = results.fullest(run)
    first = next((i for i, n in enumerate(known) if run.measurements[n] is full), 0)
    chosen = st.selectbox(
        "Load", known, first, format_func=lambda n: str(run.measurements[n].load), key=f"load {run.id}", width=260
    )
    return int(chosen)


def _gantt(table: timeline.Table, name: str) -> None:
    with st.container(horizontal=True):
        for share in timeline.shares(table):
            st.metric(
                f"Stage {share.stage}: bubble ratio",
                words.share(share.bubble_ratio),
                border=True,
                help=f"Computing {words.seconds(share.busy_s)}, copying {words.seconds(share.copy_s)}, waiting "
                f"{words.seconds(share.bubble_s)} while micro-batches were in progress, over the whole recording.",
            )
        st.metric("Recorded", words.seconds(table.end_s - table.begin_s), border=True)
        st.metric("Spans", f"{len(table.spans):,}", border=True, help="Runs of a stage on a micro-batch, and copies.")
    low, high = _window(table, name)
    spans, cut = timeline.span_rows(table, low, high)
    names = [f"stage {n}" for n in table.stages]
    rows = timeline.bubble_rows(table, low, high)
    st.vega_lite_chart(charts.gantt(spans, rows, names, (low * 1e3, high * 1e3)), width="stretch", key="chart-gantt")
    more = (
        f" Only the first {timeline.MAX_SPANS:,} spans of this window are drawn; choose a narrower one." if cut else ""
    )
    st.caption(
        f"Dashed grey: a bubble, the stage waits. Scroll to zoom, drag to move, point at a bar for details.{more}"
    )
    st.markdown("**The whole recording**")
    overall = timeline.utilisation_rows(table)
    st.vega_lite_chart(charts.utilisation(overall, (low, high)), width="stretch", key="chart-whole")
    st.caption("The grey band is the window above.")


def _window(table: timeline.Table, name: str) -> tuple[float, float]:
    """The window to draw, in seconds, from the slider."""
    begin, end = table.begin_s, table.end_s
    low, high = timeline.first_window(table)
    step = max((end - begin) / 1000, 1e-6)
    chosen = st.slider("Window (s)", begin, end, (low, high), step=step, format="%.3f", key=f"window {name}")
    return float(chosen[0]), float(chosen[1])

"""The Timeline page: a Gantt chart of the stages of a recorded run."""

import streamlit as st
from stageline.dashboard.charts import timeline as charts
from stageline.dashboard.figures import runs as results
from stageline.dashboard.figures import timeline
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views import address
from stageline.dashboard.views.common import empty, page
from stageline.dashboard.views.recorded import choices, lines, named_runs, no_runs, run_of, store, table_of
from stageline.runtime import words
from stageline.runtime.bench import perfetto
from stageline.runtime.bench.records import OURS, Run
from stageline.runtime.report.spec import Spec, dressed


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
        run_id = st.selectbox(
            "Run",
            ids,
            start,
            format_func=lambda one: known[one],
            key=f"run {ids[start]}",
            width=420,
            on_change=address.forget,
            args=("load", "from", "to"),
        )
        run = run_of(run_id)
        place = _measurement(run)
    address.keep("run", run_id)
    table = None if place is None else table_of(run, place)
    if table is None or not table.spans:
        empty(
            "This run has no timeline",
            "Only a pipeline in the benchmark's own process is recorded; imported runs may lack a timeline.",
            [f"stageline bench {as_typed(run.bundle)}"],
        )
        return
    assert place is not None
    _gantt(table, run, place)


def _measurement(run: Run) -> int | None:
    """The number of the chosen measurement, among those with a timeline."""
    recorded = store().timelines(run.id)
    known = [n for n, one in enumerate(run.measurements) if one.contender == OURS and one.stages and n in recorded]
    if not known:
        return None
    full = results.fullest(run)
    loads = {str(n): str(run.measurements[n].load) for n in known}
    first = next((str(n) for n in known if run.measurements[n] is full), next(iter(loads)))
    address.start("load", f"load {run.id}", list(loads), first)
    chosen = st.selectbox(
        "Load",
        list(loads),
        format_func=loads.__getitem__,
        key=f"load {run.id}",
        width=260,
        on_change=address.forget,
        args=("from", "to"),
    )
    address.keep("load", chosen, first)
    return int(chosen)


def _gantt(table: timeline.Table, run: Run, place: int) -> None:
    with st.grid(min_column_width=150, gap="xsmall"):
        for share in timeline.shares(table):
            st.metric(
                f"Stage {share.stage} bubbles",
                words.share(share.bubble_ratio),
                border=True,
                help=f"Computing {words.seconds(share.busy_s)}, copying {words.seconds(share.copy_s)}, waiting "
                f"{words.seconds(share.bubble_s)} while micro-batches were in progress, over the whole recording.",
            )
        st.metric("Recorded", words.seconds(table.end_s - table.begin_s), border=True)
        st.metric("Spans", f"{len(table.spans):,}", border=True, help="Runs of a stage on a micro-batch, and copies.")
    low, high = _window(table, f"window {run.id} {place}")
    _download(run, place)
    spans, cut = timeline.span_rows(table, low, high)
    names = [f"stage {n}" for n in table.stages]
    rows = timeline.bubble_rows(table, low, high)
    shown = f"from {words.seconds(low)} to {words.seconds(high)}"
    _selectable(
        charts.gantt(spans, rows, names, (low * 1e3, high * 1e3)), f"gantt {run.id} {place} {low} {high}", run, place,
        1e3, f"{len(spans)} spans and {len(rows)} bubbles of {words.counted(len(names), 'stage')}, {shown}.",
    )  # fmt: skip
    more = (
        f" Only the first {timeline.MAX_SPANS:,} spans of this window are drawn; choose a narrower one." if cut else ""
    )
    st.caption(f"Dashed grey: a bubble, the stage waits. Drag over a chart to see that part; point at a bar.{more}")
    st.markdown("**The whole recording**")
    _selectable(
        charts.utilisation(timeline.utilisation_rows(table), (low, high)), f"whole {run.id} {place} {low} {high}", run,
        place, 1.0, f"Utilisation of each stage in all that was recorded; the window is {shown}.",
    )  # fmt: skip
    st.caption("The grey band is the window above.")


def _selectable(spec: Spec, key: str, run: Run, place: int, per_s: float, sentence: str) -> None:
    """A chart on which a window can be selected; its axis has `per_s` units a second."""
    table = table_of(run, place)

    def selected() -> None:
        chosen = [ends for one in st.session_state[key]["selection"].values() for ends in one.values()]
        if chosen:
            low, high = sorted(chosen[0])
            _go(table, f"window {run.id} {place}", low / per_s, high / per_s)

    theme = st.context.theme.type or "light"
    st.vega_lite_chart(
        dressed(spec, theme), width="stretch", key=key, alt=sentence, on_select=selected,
        selection_mode=charts.WINDOW,
    )  # fmt: skip


def _go(table: timeline.Table, key: str, low_s: float, high_s: float) -> None:
    """Show this window, as far as it lies in the recording. In callbacks: it moves the slider."""
    st.session_state[key] = timeline.bounded(table, low_s, high_s)


def _window(table: timeline.Table, key: str) -> tuple[float, float]:
    """The window to draw, in seconds: from the slider, the buttons, a selection or the address, which all agree."""
    begin, end = table.begin_s, table.end_s
    if key not in st.session_state:
        _go(table, key, *(_addressed() or timeline.first_window(table)))
    low, high = st.session_state[key]
    step, length = max((end - begin) / 1000, 1e-6), high - low
    st.slider(
        f"Window (s of {begin:.3f} to {end:.3f})", begin, end, step=step, format="%.3f", key=key,
    )  # fmt: skip
    low, high = st.session_state[key]
    bubble = timeline.around_longest_bubble(table)
    moves = {
        "Earlier": (low - 0.8 * length, high - 0.8 * length),
        "Later": (low + 0.8 * length, high + 0.8 * length),
        "Zoom in": (low + length / 4, high - length / 4),
        "Zoom out": (low - length / 2, high + length / 2),
        "Longest bubble": bubble or (low, high),
        "Whole recording": (begin, end),
    }
    with st.container(horizontal=True, gap="small"):
        for label, (to_low, to_high) in moves.items():
            st.button(
                label, key=f"{label} {key}", on_click=_go, args=(table, key, to_low, to_high),
                disabled=label == "Longest bubble" and bubble is None,
            )  # fmt: skip
    address.keep("from", f"{low:.6g}")
    address.keep("to", f"{high:.6g}")
    return float(low), float(high)


def _addressed() -> tuple[float, float] | None:
    try:
        return float(st.query_params["from"]), float(st.query_params["to"])
    except (KeyError, ValueError):
        return None


def _download(run: Run, place: int) -> None:
    def trace() -> str:
        found = store().timeline(run.id, place)
        return perfetto.document(found.spans, found.requests, f"{run.id} {run.name}")

    st.download_button(
        "Download for Perfetto", trace, f"{run.id}-{place}.trace.json", "application/json", key="perfetto",
        icon=":material/download:", on_click="ignore", help="Open the file at ui.perfetto.dev or chrome://tracing.",
    )  # fmt: skip

"""The Overview page: the latest run of each bundle against its baselines and the run before."""

import time
from typing import Literal

import streamlit as st
from stageline.dashboard.charts import runs as charts
from stageline.dashboard.figures import runs as results
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views.common import page
from stageline.dashboard.views.recorded import RECENT, differences_caption, lines, named_runs, no_runs, run_of
from stageline.models.errors import StagelineError
from stageline.runtime import words
from stageline.runtime.bench.records import OURS, Run, RunLine

_PILLS = 6  # bundles offered side by side; more are in a list
_THRESHOLD = 0.05  # as for stageline bench compare: smaller changes are ignored


@page("Overview", "What each bundle's pipeline achieves: throughput and latency first, then where the time goes.")
def show() -> None:
    """Draw the page."""
    found = lines()
    _running(found)
    measured = [line for line in found if line.headlines]
    if not measured:
        no_runs()
        return
    line = _chosen(measured)
    run = run_of(line.id)
    before = _before(measured, line)
    _head(run)
    _cards(run, before)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _curve(run)
    with right:
        _baselines(run)
        _stages(run)
    _changes(run, before)
    _all_runs(found)


def _running(found: list[RunLine]) -> None:
    for line in found:
        if line.status == "running":
            share, step = line.progress.share, line.progress.step
            st.info(
                f"A benchmark of {results.short(line.bundle)} is running: {words.share(share)}, {step}.",
                icon=":material/hourglass_top:",
            )


def _chosen(measured: list[RunLine]) -> RunLine:
    """The run named by the query parameter `run`, else the newest of the chosen bundle."""
    bundles = results.by_bundle(measured)
    wanted = named_runs("run")
    start = next((line for line in measured if line.id in wanted), measured[0])
    names = {bundle: results.short(bundle) for bundle in bundles}
    if len(bundles) > 1:
        key = f"bundle of {start.id}"
        if len(bundles) <= _PILLS:
            chosen = st.segmented_control(
                "Bundle", list(bundles), default=start.bundle, required=True, format_func=names.__getitem__, key=key
            )
        else:
            place = list(bundles).index(start.bundle)
            chosen = st.selectbox("Bundle", list(bundles), place, format_func=names.__getitem__, key=key)
        if chosen != start.bundle:
            start = bundles[str(chosen)][0]
    return start


def _before(measured: list[RunLine], line: RunLine) -> Run | None:
    """The earlier run to compare with, if it can be read."""
    earlier = results.earlier(measured, line)
    try:
        return run_of(earlier.id) if earlier else None
    except StagelineError:
        return None


def _head(run: Run) -> None:
    stages = words.counted(len(run.plan.blocks), "stage")
    st.subheader(
        f"{results.short(run.bundle)}: {stages} of {' + '.join(map(str, run.plan.blocks))} blocks", anchor=False
    )
    endings = {"done": "", "running": " Still running.", "cancelled": " Cancelled before its end."}
    ending = endings.get(run.status, f" Failed: {run.error}.")
    machine = f"{run.environment.machine}, {words.counted(run.environment.cores, 'CPU core')}"
    st.caption(
        f"Measured {words.ago(run.created, time.time())} ({words.clock(run.created)}), {run.settings.pipeline.engine}, "
        f"{run.dtype}, {run.settings.inputs}. {machine}."
        f"{ending} Run `{run.id}`."
    )


def _cards(run: Run, before: Run | None) -> None:
    with st.container(horizontal=True, key="headlines"):
        for card in results.cards(run, before):
            colors: dict[str | None, Literal["normal", "inverse", "off"]] = {"higher": "normal", "lower": "inverse"}
            st.metric(
                card.label,
                card.value,
                card.change,
                delta_color=colors.get(card.better, "off") if card.sure else "off",
                help=card.about,
                border=True,
                height="stretch",
            )
    if before is not None:
        st.caption(
            f"Changes since the run before, {words.ago(before.created, time.time())} (`{before.id}`). Grey ones are "
            "within the variation of the repeats."
        )


def _curve(run: Run) -> None:
    st.subheader("Throughput and latency", anchor=False)
    percentile = str(
        st.segmented_control(
            "Latency", results.PERCENTILES, default="p99", required=True, key="percentile", label_visibility="collapsed"
        )
    )
    rows = results.curve_rows(run, percentile)
    if not rows:
        st.caption("No latency was measured in this run.")
        return
    unit = "tokens/s" if results.generates(run) else "texts/s"
    slo = run.settings.slo.latency_s
    contenders = list(dict.fromkeys([OURS, *(row["contender"] for row in rows)]))
    chart = charts.curve(rows, unit, percentile, None if slo is None else slo * 1e3, contenders)
    st.vega_lite_chart(chart, width="stretch", key="chart-curve")
    st.caption("Each point is a load; a line joins the loads of one sweep. Further right and lower is better.")


def _baselines(run: Run) -> None:
    rows = results.baseline_rows(run)
    st.subheader("Against the baselines", anchor=False)
    if len(rows) < 2:
        st.caption("This run has none. To measure one alongside the pipeline:")
        st.code(f"stageline bench {as_typed(run.bundle)} --baseline onnxruntime", language="bash", wrap_lines=True)
        return
    unit = "tokens/s" if results.generates(run) else "texts/s"
    st.vega_lite_chart(charts.baselines(rows, unit), width="stretch", key="chart-baselines")
    loads = sorted({row["load"] for row in rows})
    others = [f"{row['ratio']:.2f} times {row['contender']} ({row['load']})" for row in rows if row["ratio"]]
    st.caption(f"Load: {', '.join(loads)}. This bundle reaches {', '.join(others)}.")


def _stages(run: Run) -> None:
    full = results.fullest(run)
    if full is None or not full.stages:
        return
    st.subheader("Where the time goes", anchor=False)
    st.vega_lite_chart(charts.stages(results.stage_rows(full)), width="stretch", key="chart-stages")
    st.caption(f"Load: {full.load}.")
    st.page_link(
        st.session_state["pages"]["timeline"],
        label="See its timeline",
        icon=":material/view_timeline:",
        query_params={"run": run.id},
    )


def _changes(run: Run, before: Run | None) -> None:
    if before is None:
        return
    st.subheader("What changed since the run before", anchor=False)
    shared = results.common_loads([before, run])
    ours = [key for key in shared if key[0] == OURS]
    if ours:
        key = (
            st.selectbox("Load", ours, format_func=lambda one: one[1], key="changed load") if len(ours) > 1 else ours[0]
        )
        found = results.changes(before, run, key, _THRESHOLD)
        st.dataframe(results.change_table(found), hide_index=True, key="changes", height="content")
    differences_caption(before, run)
    st.page_link(
        st.session_state["pages"]["compare"],
        label="Compare the two",
        icon=":material/compare_arrows:",
        query_params={"runs": f"{before.id},{run.id}"},
    )


def _all_runs(found: list[RunLine]) -> None:
    with st.expander(
        f"All runs ({len(found):,})" if len(found) <= RECENT else f"The newest {RECENT} of {len(found):,} runs"
    ):
        now_s = time.time()
        st.dataframe(
            [
                {
                    "open": f"?run={line.id}",
                    "bundle": results.short(line.bundle),
                    "name": line.name,
                    "when": words.ago(line.created, now_s),
                    "status": line.status,
                    "loads": len(line.headlines),
                    "best requests/s": max(
                        (h.requests_per_s or 0.0 for h in line.headlines if h.contender == OURS), default=None
                    ),
                }
                for line in found[:RECENT]
            ],
            hide_index=True,
            column_config={
                "open": st.column_config.LinkColumn("open", display_text=r"run=(.*)"),
                "best requests/s": st.column_config.NumberColumn(format="%.1f"),
            },
            key="all runs",
        )

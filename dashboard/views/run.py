"""The page Run a benchmark: choose what to measure, follow it, cancel it."""

import importlib.util
import shlex
from pathlib import Path
from typing import get_args

import streamlit as st
from stageline.dashboard.children import benchmarks
from stageline.dashboard.children.benchmarks import Launcher, Order
from stageline.dashboard.figures import runs as results
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views.common import choose_bundle, guarded, page
from stageline.dashboard.views.recorded import store
from stageline.models.errors import StagelineError, StoreError
from stageline.runtime import words
from stageline.runtime.bench.figures import MEANINGS
from stageline.runtime.bench.options import MLPERF
from stageline.runtime.bench.records import Figure, Run
from stageline.runtime.bundle.folder import read_manifest
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.engines import WeightDtype
from stageline.runtime.options import PipelineOptions

_REFRESH_S = 1.0


@page(
    "Run a benchmark",
    "Measures a bundle on this machine with `stageline bench`. The run continues when this page is closed.",
)
def show() -> None:
    """Draw the page."""
    lines = benchmarks.running(store())
    current = lines[0].id if lines else _launcher().starting()
    if current:
        _following(current)
    elif "run" in st.query_params:
        guarded(lambda: _outcome(st.query_params["run"]))
    _form(current is not None)


@st.cache_resource
def _launcher() -> Launcher:
    return Launcher()


@st.fragment(run_every=_REFRESH_S)
def _following(run_id: str) -> None:
    """The progress of a run; when it has ended, the whole page is drawn again."""
    run = _if_begun(run_id)
    if run is None and _launcher().starting() != run_id:
        st.query_params["run"] = run_id
        st.rerun()
    if run is not None and run.status != "running":
        st.query_params["run"] = run_id
        st.rerun()
    with st.container(border=True, key="progress"):
        share, step = (run.progress.share, run.progress.step) if run else (0.0, "starting")
        st.subheader(f"Measuring {results.short(run.bundle)}" if run else "Starting", anchor=False)
        st.progress(min(1.0, max(0.0, share)), text=f"{words.share(share)}: {step}")
        if run:
            _live(run)
            _so_far(run)
        if st.button("Cancel", icon=":material/stop_circle:", key="cancel"):
            if run is None or not store().cancel(run_id):
                _launcher().interrupt(run_id)
            st.toast("Cancelling. Measurements so far are kept.")


def _if_begun(run_id: str) -> Run | None:
    try:
        return store().run(run_id)
    except StoreError:
        if _launcher().starting() == run_id or _launcher().failure(run_id):
            return None
        raise


def _live(run: Run) -> None:
    figures = [
        (name, Figure.of(*MEANINGS[name][:2], [value])) for name, value in run.progress.live.items() if name in MEANINGS
    ]
    if figures:
        with st.container(horizontal=True):
            for name, figure in figures:
                st.metric(results.figure_label(name), results.figure_text(figure), border=True, height="stretch")


def _so_far(run: Run) -> None:
    rows = [
        {
            "contender": one.contender,
            "load": str(one.load),
            **{
                results.figure_label(name): results.figure_text(one.figures[name])
                for name in ("requests_per_s", "tokens_per_s", "latency_p50_s", "latency_p99_s", "ttft_p50_s")
                if name in one.figures
            },
        }
        for one in run.measurements
    ]
    if rows:
        st.dataframe(rows, hide_index=True, height="content")


def _outcome(run_id: str) -> None:
    failure = _launcher().failure(run_id)
    try:
        run = store().run(run_id)
    except StoreError:
        if failure is None:
            raise
        st.error(f"The benchmark did not begin: {failure}", icon=":material/error:")
        return
    kept = f"; {words.counted(len(run.measurements), 'measurement')} kept" if run.measurements else ""
    if run.status == "done":
        st.success(
            f"Done: {results.short(run.bundle)}, {words.counted(len(run.measurements), 'measurement')}.",
            icon=":material/check_circle:",
        )
    elif run.status == "cancelled":
        st.info(f"Cancelled{kept}.", icon=":material/cancel:")
    else:
        st.error(f"Failed: {run.error or failure}{kept}.", icon=":material/error:")
    _so_far(run)
    if run.measurements:
        with st.container(horizontal=True):
            for page_name, label, icon in (
                ("overview", "Overview", "speed"),
                ("timeline", "Timeline", "view_timeline"),
            ):
                st.page_link(
                    st.session_state["pages"][page_name],
                    label=label,
                    icon=f":material/{icon}:",
                    query_params={"run": run.id},
                )


def _form(busy: bool) -> None:
    bundle = choose_bundle()
    if bundle is None:
        return
    manifest = read_manifest(bundle)
    order = _order(bundle, manifest)
    st.caption("The same in a terminal:")
    st.code(f"stageline bench {shlex.join([as_typed(bundle), *order.options()])}", language="bash", wrap_lines=True)
    about = "One at a time: two runs would disturb each other." if busy else None
    if st.button("Start", type="primary", icon=":material/play_arrow:", disabled=busy, help=about, key="start"):
        guarded(lambda: _start(order))


def _start(order: Order) -> None:
    if not (order.scenarios or order.concurrency or order.rates):
        raise StagelineError("no load is chosen: pick a scenario, or enter concurrencies or rates")
    with st.spinner("Starting"):
        st.query_params["run"] = _launcher().start(store(), order)
    st.rerun()


def _order(bundle: Path, manifest: Manifest) -> Order:
    now = [stage.last_block - stage.first_block + 1 for stage in manifest.stages]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        stages = st.selectbox(
            "Plan",
            [0, *(n for n in range(1, min(8, manifest.blocks) + 1) if n != len(now))],
            format_func=lambda n: (
                f"{n} even stages" if n > 1 else "1 stage" if n else f"current: {' + '.join(map(str, now))}"
            ),
            key=f"plan of {bundle}",
            width=230,
        )
        quantise = st.selectbox(
            "Quantise", [None, *get_args(WeightDtype)], format_func=lambda one: one or "no", key="quantise", width=140
        )
        threads = st.number_input("Threads", 1, value=None, placeholder="all", key="threads", width=120)
        seconds = st.number_input("Seconds per repeat", 0.2, 3600.0, 5.0, step=1.0, key="seconds", width=150)
        repeats = st.number_input(
            "Repeats", 1, 100, 3, key="repeats", help="Confidence intervals need at least 2.", width=120
        )
        tokens = None
        if manifest.cached:
            tokens = int(st.number_input("New tokens per request", 1, 4096, 32, key="new tokens", width=170))
    with st.container(horizontal=True, vertical_alignment="top"):
        scenarios = st.pills(
            "Scenarios", MLPERF, selection_mode="multi", default=["SingleStream", "Offline"], key="scenarios",
            help="SingleStream: one request after the other. Offline: all at once. Server: Poisson arrivals.",
        )  # fmt: skip
        concurrency = st.text_input(
            "Concurrency sweep",
            "2,4,8",
            key="concurrency",
            help="Closed loops with N requests at a time.",
            width=180,
        )
        rates = st.text_input(
            "Rate sweep (requests/s)", "", placeholder="5,10,20", key="rates", help="Open loops.", width=180
        )
    with st.expander("Baselines and bounds"):
        known = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
        checkpoint = st.text_input(
            "Checkpoint, for torch", "", placeholder="models/checkpoints/minilm", key="checkpoint"
        )
        known += ["torch", "torch-compile"] if checkpoint else []
        baselines = st.multiselect(
            "Baselines, measured alternately with the pipeline", known, key="baselines", accept_new_options=True,
            help="Or the URL of an OpenAI-compatible service.",
        )  # fmt: skip
        slo = st.text_input("SLO, for goodput", "", placeholder="latency=2s,ttft=200ms,tpot=50ms", key="slo")
    return Order(
        bundle, int(stages) or None, tuple(scenarios), concurrency, rates, float(seconds), int(repeats), tokens, slo,
        tuple(baselines), checkpoint if {"torch", "torch-compile"} & set(baselines) else "",
        PipelineOptions(threads=int(threads) if threads else None, quantise=quantise),
    )  # fmt: skip

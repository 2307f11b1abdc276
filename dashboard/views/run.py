"""The page Run a benchmark: choose what to measure, follow it, cancel it."""

import importlib.util
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import streamlit as st
from stageline.dashboard.children.order import Order
from stageline.dashboard.figures import runs as results
from stageline.dashboard.settings import DashboardSettings, as_typed, usable_engines
from stageline.dashboard.views import address
from stageline.dashboard.views.common import choose_bundle, guarded, page, plain
from stageline.dashboard.views.launching import launcher, turn
from stageline.dashboard.views.recorded import store
from stageline.models.errors import StoreError
from stageline.runtime import words
from stageline.runtime.bench.figures import MEANINGS
from stageline.runtime.bench.options import MLPERF
from stageline.runtime.bench.records import Figure, Run
from stageline.runtime.bundle.folder import read_manifest
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.engines import WeightDtype
from stageline.runtime.options import PipelineOptions
from stageline.runtime.report import wording

_REFRESH_S = 1.0
_PRESETS: dict[str, dict[str, Any]] = {
    "Quick": {
        "seconds": 1.0, "repeats": 2, "scenarios": ["SingleStream"], "concurrency": "4", "rates": "", "sweep": False,
    },
    "Standard": {
        "seconds": 5.0, "repeats": 3, "scenarios": ["SingleStream", "Offline"], "concurrency": "2,4,8", "rates": "",
        "sweep": False,
    },
    "Sweep": {"seconds": 5.0, "repeats": 6, "scenarios": [], "concurrency": "", "rates": "", "sweep": True},
}  # fmt: skip
_FIELDS = _PRESETS["Standard"]
_TOKENS = 32


@page(
    "Run a benchmark",
    "Measures a bundle on this machine with `stageline bench`. The run continues when this page is closed.",
)
def show() -> None:
    """Draw the page."""
    current = next(iter(turn().runs(store())), None) or launcher().starting()
    if current:
        _following(current)
    elif "run" in st.query_params:
        guarded(lambda: _outcome(st.query_params["run"]))
    _form(turn().taken(store()))


@st.fragment(run_every=_REFRESH_S)
def _following(run_id: str) -> None:
    """The progress of a run; when it has ended, the whole page is drawn again."""
    run = _if_begun(run_id)
    begun = run is not None and run.status == "running" and launcher().failure(run_id) is None
    if not begun and launcher().starting() != run_id:
        st.query_params["run"] = run_id
        st.rerun()
    with st.container(border=True, key="progress"):
        share, step = (run.progress.share, run.progress.step) if run else (0.0, "starting")
        share = min(1.0, max(0.0, share))
        st.subheader(f"Measuring {plain(results.short(run.bundle))}" if run else "Starting", anchor=False)
        st.progress(share, text=f"{words.share(share)}: {step}{_clock(run, share)}")
        if run:
            _live(run)
            _so_far(run)
        if not DashboardSettings.given().read_only and st.button("Cancel", icon=":material/stop_circle:", key="cancel"):
            if run is None or not store().cancel(run_id):
                launcher().interrupt(run_id)
            st.toast("Cancelling. Measurements so far are kept.")


def _clock(run: Run | None, share: float) -> str:
    """How long it has taken, and about how long it will take."""
    if run is None:
        return ""
    passed_s = max(0.0, time.time() - run.created)
    left = f", about {words.seconds(round(passed_s * (1 - share) / share))} left" if share > 0.05 else ""
    return f" ({words.seconds(round(passed_s))} so far{left})"


def _if_begun(run_id: str) -> Run | None:
    try:
        return store().run(run_id)
    except StoreError:
        if launcher().starting() == run_id or launcher().failure(run_id):
            return None
        raise


def _live(run: Run) -> None:
    """The figures of the load that is measured now; none before its first request has ended."""
    figures = [
        (name, Figure.of(*MEANINGS[name][:2], [value]))
        for name, value in run.progress.live.items()
        if name in MEANINGS and value > 0
    ]
    if figures:
        with st.grid(min_column_width=150, gap="xsmall"):
            for name, figure in figures:
                st.metric(results.figure_label(name), wording.value(figure, unit=False), border=True, height="stretch")


def _so_far(run: Run) -> None:
    rows = [
        {
            "contender": one.contender,
            "load": str(one.load),
            **{
                results.figure_label(name): results.figure_text(one.figures[name])
                for name in ("requests_per_s", "tokens_per_s", "latency_p50_s", "ttft_p50_s", "requests")
                if name in one.figures
            },
        }
        for one in run.measurements
    ]
    if rows:
        st.dataframe(rows, hide_index=True, height="content")


def _outcome(run_id: str) -> None:
    failure = launcher().failure(run_id)
    try:
        run = store().run(run_id)
    except StoreError:
        if failure is None:
            raise
        st.error(f"The benchmark did not begin: {plain(failure)}", icon=":material/error:")
        return
    kept = f"; {words.counted(len(run.measurements), 'measurement')} kept" if run.measurements else ""
    if run.status == "done":
        st.success(
            f"Done: {plain(results.short(run.bundle))}, {words.counted(len(run.measurements), 'measurement')}.",
            icon=":material/check_circle:",
        )
    elif run.status == "cancelled":
        st.info(f"Cancelled{kept}.", icon=":material/cancel:")
    else:
        st.error(f"Failed: {plain(str(run.error or failure))}{kept}.", icon=":material/error:")
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


def _form(taken: str | None) -> None:
    bundle = choose_bundle()
    if bundle is None:
        return
    settings = DashboardSettings.given()
    order = _order(bundle, read_manifest(bundle))
    problems = order.problems(settings.services)
    if problems:
        st.warning("\n".join(f"- {one[:1].upper()}{one[1:]}" for one in problems), icon=":material/edit:")
    else:
        contenders = words.counted(1 + len(order.baselines), "contender")
        each = f"{words.counted(len(order.loads()), 'load')} of {order.repeats} × {order.seconds:g} s"
        each = f"loads that it chooses, of up to {order.repeats} × {order.seconds:g} s" if order.sweep else each
        unbounded = " Without an SLO, a sweep searches no rates." if order.sweep and not order.slo.strip() else ""
        st.caption(
            f"About {words.seconds(order.seconds_in_all())}: {contenders}, each with {each}, a warm-up and its "
            f"opening{', after the check of quality' if order.check else ''}.{unbounded} The same in a terminal:"
        )
        own = ["--store", as_typed(settings.store)] if settings.store else []
        typed = order.commands()
        st.code("\n".join(map(shlex.join, [*typed[:-1], [*typed[-1], *own]])), language="bash", wrap_lines=True)
    about = f"{taken[:1].upper()}{taken[1:]}: one at a time, both would disturb each other." if taken else None
    about = "This dashboard is read-only." if settings.read_only else about
    off = taken is not None or settings.read_only or bool(problems)
    if st.button("Start", type="primary", icon=":material/play_arrow:", disabled=off, help=about, key="start"):
        guarded(lambda: _start(order))


def _start(order: Order) -> None:
    with st.spinner("Starting"):
        st.query_params["run"] = launcher().start(store(), order)
    st.rerun()


def _fill(name: str) -> None:
    for key, value in _PRESETS[name].items():
        st.session_state[key] = value


def _order(bundle: Path, manifest: Manifest) -> Order:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("Fill in", width="content")
        for name in _PRESETS:
            st.button(name, key=f"preset {name}", on_click=_fill, args=(name,))
    pipeline, stages, tokens = _measured(bundle, manifest)
    seconds, repeats, sweep, scenarios, concurrency, rates = _loads()
    baselines, checkpoint, slo, check = _beside()
    return Order(
        bundle, stages, tuple(scenarios), concurrency, rates, seconds, repeats, tokens, slo, tuple(baselines),
        checkpoint, pipeline, sweep, check,
    )  # fmt: skip


def _measured(bundle: Path, manifest: Manifest) -> tuple[PipelineOptions, int | None, int | None]:
    """What is measured: the pipeline's options, its number of stages if not the bundle's, and tokens of a request."""
    now = len(manifest.stages)
    plans = {"": f"current: {' + '.join(map(str, manifest.layers))}"}
    plans |= {str(n): words.counted(n, "stage") for n in range(1, min(8, manifest.blocks) + 1) if n != now}
    quantised = ["", *get_args(WeightDtype)]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        address.start("stages", f"plan of {bundle}", list(plans), "")
        stages = st.selectbox("Plan", list(plans), format_func=plans.__getitem__, key=f"plan of {bundle}", width=230)
        address.keep("stages", stages)
        engines = usable_engines()
        address.start("engine", "engine", engines, engines[0])
        engine = str(st.selectbox("Engine", engines, key="engine", width=180))
        address.keep("engine", engine, engines[0])
        address.start("quantise", "quantise", quantised, "")
        quantise = st.selectbox("Quantise", quantised, format_func=lambda one: one or "no", key="quantise", width=140)
        address.keep("quantise", quantise)
        threads = _number("Threads", "threads", None, int, 120, placeholder="all")
        tokens = _number("New tokens per request", "new tokens", _TOKENS, int, 170) if manifest.cached else None
    pipeline = PipelineOptions(engine, threads=threads, quantise=quantise or None)
    return pipeline, int(stages) if stages else None, tokens


def _loads() -> tuple[float | None, int | None, bool, list[str], str, str]:
    """Seconds and number of repeats, whether they are of a sweep, or else scenarios, concurrencies and rates."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        address.restore_several("scenarios", "scenarios", MLPERF, _FIELDS["scenarios"])
        scenarios = st.pills(
            "Scenarios", MLPERF, selection_mode="multi", key="scenarios",
            help="SingleStream: one request after the other. Offline: all at once. Server: Poisson arrivals.",
        )  # fmt: skip
        _keep_several("scenarios", scenarios, _FIELDS["scenarios"])
        concurrency = _text("Requests at a time", "concurrency", _FIELDS["concurrency"], 180, "Closed loops.")
        rates = _text("Rates (requests/s)", "rates", "", 180, "Open loops.", placeholder="5,10,20")
        seconds = _number("Seconds per repeat", "seconds", _FIELDS["seconds"], float, 150)
        repeats = _number("Repeats", "repeats", _FIELDS["repeats"], int, 120, help="Intervals need at least 2.")
        sweep = _toggle(
            "Sweep", "sweep", "Search the knee, and the largest rate within the SLO, instead of these loads.", _swept
        )
    return seconds, repeats, sweep, list(scenarios), concurrency, rates


def _swept() -> None:
    """A sweep chooses its loads itself."""
    loads = _PRESETS["Sweep" if st.session_state["sweep"] else "Standard"]
    for key in ("scenarios", "concurrency", "rates"):
        st.session_state[key] = loads[key]


def _beside() -> tuple[list[str], str, str, bool]:
    """Baselines, the checkpoint for torch, the SLO, and whether quality is checked."""
    known = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    usual = known[:1]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        checkpoint = _text("Checkpoint, for torch", "checkpoint", "", 260, placeholder="models/checkpoints/minilm")
        known += ["torch", "torch-compile"] if checkpoint else []
        asked = [*known, *(one for one in st.query_params.get("baselines", "").split(",") if "://" in one)]
        address.restore_several("baselines", "baselines", asked, usual)
        baselines = st.multiselect(
            "Baselines, measured alternately with the pipeline", known, key="baselines", accept_new_options=True,
            help="Or the URL of an OpenAI-compatible service.", width=320,
        )  # fmt: skip
        _keep_several("baselines", baselines, usual)
        slo = _text("SLO, for goodput", "slo", "", 260, placeholder="latency=2s,ttft=200ms,tpot=50ms")
        check = _toggle(
            "Check quality", "check", "Also what quantising loses, on built-in texts, beside the bundle as it is."
        )
    return list(baselines), checkpoint, slo, check


def _text(label: str, key: str, default: str, width: int, help: str | None = None, placeholder: str = "") -> str:
    address.restore(key, key, default)
    text = st.text_input(label, key=key, width=width, help=help, placeholder=placeholder)
    address.keep(key, text, default)
    return text


def _toggle(label: str, key: str, help: str, on_change: Callable[[], None] | None = None) -> bool:
    if key not in st.session_state:
        st.session_state[key] = st.query_params.get(key) == "yes"
    on = st.toggle(label, key=key, help=help, on_change=on_change)
    address.keep(key, "yes" if on else "")
    return on


def _number(label: str, key: str, default: float | None, kind: type[int] | type[float], width: int, **more: Any) -> Any:
    """A box without bounds: beyond them Streamlit would keep the number of before. `Order.problems` checks it."""
    address.restore_number(key, key, default, kind)
    value = st.number_input(label, key=key, width=width, step=1 if kind is int else 1.0, **more)
    address.keep(key, "" if value is None else f"{value:g}", "" if default is None else f"{default:g}")
    return value


def _keep_several(name: str, chosen: Sequence[str], default: Sequence[str]) -> None:
    address.keep(name, ",".join(chosen), ",".join(default))

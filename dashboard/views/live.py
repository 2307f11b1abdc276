"""The Live page: a running service over the last minutes."""

import time
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from stageline.dashboard.charts.live import lines
from stageline.dashboard.children.services import Services, Traffic
from stageline.dashboard.figures import live
from stageline.dashboard.settings import DashboardSettings, find_bundles
from stageline.dashboard.views.common import empty, guarded, labels, page
from stageline.runtime import words

_REFRESH_S = 2.0
_URL = "http://127.0.0.1:8000"


@page("Live", "A running pipeline over the last minutes, read from the metrics of `stageline serve`.")
def show() -> None:
    """Draw the page."""
    _own_services()
    url = st.text_input("Service", key="url", placeholder=_URL, bind="query-params") or _URL
    _watched(url)


@st.cache_resource
def _services() -> Services:
    return Services()


@st.cache_resource(max_entries=16)
def _watcher(url: str) -> live.Watcher:
    return live.Watcher(url)


@st.cache_resource
def _traffic() -> dict[str, Traffic]:
    return {}


def _own_services() -> None:
    """Start and stop services of this dashboard."""
    bundles = labels(find_bundles(DashboardSettings.given().bundles))
    running = _services().running()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if bundles:
            chosen = st.selectbox("Start a pipeline here", list(bundles), key="serve", width=260)
            if st.button("Start", type="primary", icon=":material/play_arrow:", key="start"):
                guarded(lambda: _start(bundles[str(chosen)]))
        for service in running:
            if st.button(f"Stop {service.bundle.name}", icon=":material/stop:", key=f"stop {service.url}"):
                _services().stop(service.bundle)
                st.rerun()


def _start(bundle: Path) -> None:
    with st.spinner(f"Opening {bundle.name}"):
        service = _services().start(bundle)
    st.query_params["url"] = service.url
    st.rerun()


@st.fragment(run_every=_REFRESH_S)
def _watched(url: str) -> None:
    samples, error = _watcher(url).look()
    if not samples:
        empty(
            "No service to watch yet",
            f"{str(error)[:1].upper()}{str(error)[1:]}. Start a pipeline above, or serve a bundle:",
            ["stageline serve bundles/smollm2"],
        )
        return
    if error:
        since = words.clock(samples[-1].at_s)
        st.warning(
            f"{error}. These figures are from {since}; they update when the service is back.",
            icon=":material/cloud_off:",
        )
    names = live.models(samples[-1])
    model = names[0]
    if len(names) > 1:
        model = str(st.segmented_control("Model", names, default=names[0], required=True, key="model"))
    _headlines(samples, model)
    if not error:
        _sending(url, model, live.generates(samples[-1], model))
    _charts(samples, model)


def _headlines(samples: list[live.Sample], model: str) -> None:
    now = live.latest(samples, model)
    generates = now.slots is not None
    with st.container(horizontal=True):
        _metric("Throughput", now.throughput_per_s, lambda v: words.rate(v, "tokens" if generates else "requests"))
        if generates:
            _metric("TTFT p50", now.ttft_p50_s, words.seconds, "Time to first token of the latest requests.")
            _metric("TPOT p50", now.tpot_p50_s, words.seconds, "Time per output token after the first.")
            _metric("Queue", now.waiting, lambda v: f"{v:.0f}", "Requests waiting for a slot.")
            _metric("Slots", now.running, lambda v: f"{v:.0f} of {now.slots:.0f}", "Requests running.")
        _metric("Memory", now.memory_bytes, words.size, "Resident memory of the service's process.")
        _metric("Device memory", now.device_memory_bytes, words.size, "Used on the GPUs of this machine.")
        _metric("Power", now.power_w, lambda v: f"{v:.0f} W", "Power of this machine, as far as it has counters.")
        _metric("CPU cores", now.cores, lambda v: f"{v:.2f}", "Cores busy on average: CPU seconds per second.")


def _metric(label: str, value: float | None, shown: Callable[[float], str], about: str | None = None) -> None:
    if value is not None:
        st.metric(label, shown(value), border=True, help=about, height="stretch")


def _sending(url: str, model: str, generates: bool) -> None:
    """Send requests, so that there is something to see."""
    traffic = _traffic().get(url)
    with st.container(horizontal=True, vertical_alignment="center"):
        if traffic is not None and traffic.left_s():
            st.caption(f"Sending requests for {traffic.left_s():.0f} s more.")
            if st.button("Stop sending", key="stop sending"):
                traffic.stop()
        elif st.button(
            "Send requests for a minute", icon=":material/send:", key="send", help="From 4 streams at once."
        ):
            _traffic()[url] = Traffic(url, model, generates, 4, 60.0)


def _charts(samples: list[live.Sample], model: str) -> None:
    last, now_s = samples[-1], time.time()
    generates = live.generates(last, model)
    left, right = st.columns(2, gap="medium")
    with left:
        if generates:
            parts = [("generated", "generated_tokens"), ("prompts", "prompt_tokens")]
            found = [
                (name, live.smoothed(live.rates(samples, f"stageline_{metric}_total", model=model)))
                for name, metric in parts
            ]
            _chart("Throughput", "tokens/s", found, now_s)
        else:
            done = live.rates(samples, "stageline_requests_total", model=model, outcome="done")
            _chart("Throughput", "requests/s", [("requests", live.smoothed(done))], now_s)
    with right:
        found = [
            (
                f"stage {n}",
                live.smoothed(live.rates(samples, "stageline_stage_busy_seconds_total", model=model, stage=n)),
            )
            for n in live.stages(last, model)
        ]
        percent = [(name, [(at, 100 * min(1.0, v)) for at, v in points]) for name, points in found]
        _chart("Utilisation", "busy time of each stage (%)", percent, now_s, 100.0)
    if not generates:
        return
    left, right = st.columns(2, gap="medium")
    with left:
        _chart("Time to first token", "TTFT (ms)", _percentiles(samples, "ttft", model), now_s)
    with right:
        _chart("Time per output token", "TPOT (ms)", _percentiles(samples, "tpot", model), now_s)
    left, right = st.columns(2, gap="medium")
    with left:
        found = [
            ("running", live.series(samples, "stageline_slots_running", model=model)),
            ("waiting", live.series(samples, "stageline_queue_waiting", model=model)),
        ]
        _chart("Slots and queue", "requests", found, now_s)
    with right:
        memory = [(at, v / 1e6) for at, v in live.series(samples, "process_resident_memory_bytes")]
        _chart("Memory", "of the process (MB)", [("memory", memory)], now_s)


def _percentiles(samples: list[live.Sample], name: str, model: str) -> list[tuple[str, list[tuple[float, float]]]]:
    return [
        (
            f"p{quantile.removeprefix('0.').ljust(2, '0')}",
            [
                (at, v * 1e3)
                for at, v in live.series(samples, f"stageline_{name}_seconds", model=model, quantile=quantile)
            ],
        )
        for quantile in ("0.5", "0.9", "0.99")
    ]


def _chart(
    head: str, unit: str, found: list[tuple[str, list[tuple[float, float]]]], now_s: float, top: float | None = None
) -> None:
    st.markdown(f"**{head}**")
    rows = live.rows(found, now_s) or [{"ago_s": 0.0, "value": 0.0, "line": found[0][0]}]
    chart = lines(rows, unit, [name for name, _ in found], top)
    st.vega_lite_chart(chart, width="stretch", key=f"live {head}")

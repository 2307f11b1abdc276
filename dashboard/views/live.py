"""The Live page: a running service over the last minutes."""

import time
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from stageline.dashboard.addresses import service_address
from stageline.dashboard.charts import live as charts
from stageline.dashboard.children.services import Services, Traffic
from stageline.dashboard.figures import live
from stageline.dashboard.settings import DashboardSettings, as_typed, example_bundle, find_bundles
from stageline.dashboard.views.address import keep, start
from stageline.dashboard.views.common import empty, labels, page, plain
from stageline.models.errors import StagelineError
from stageline.runtime import words

_REFRESH_S = 2.0
_ADDRESS = "http://127.0.0.1:8000"
_RANGE = "5 min"
_STREAMS, _SECONDS = 4, 60.0  # of the requests that the page sends


@page("Live", "A running service over the last minutes, read from the metrics of `stageline serve`.")
def show() -> None:
    """Draw the page."""
    settings = DashboardSettings.given()
    bundle = example_bundle(settings.bundles)
    if not settings.read_only:
        bundle = _own_services(settings) or bundle
    with st.container(horizontal=True, vertical_alignment="bottom"):
        typed = _typed()
        st.text_input(
            "API key", type="password", key="api key", width=180, autocomplete="off",
            help="Only for the requests that this page sends; metrics need none. It stays in this browser's session.",
        )  # fmt: skip
        start("range", "range", list(live.RANGES), _RANGE)
        range_name = str(st.segmented_control("Range", list(live.RANGES), required=True, key="range"))
        keep("range", range_name, _RANGE)
    address = service_address(typed or _ADDRESS, settings.services)
    _watched(address, float(live.RANGES[range_name]), bundle)


def _typed() -> str:
    """The box of the address, which buttons set as well."""
    if "url" not in st.session_state:
        st.session_state["url"] = st.query_params.get("url", "")
    typed = st.text_input("Service", key="url", placeholder=_ADDRESS, width=320)
    keep("url", typed)
    return typed


@st.cache_resource
def _services() -> Services:
    return Services()


@st.cache_resource(max_entries=16)
def _watcher(address: str) -> live.Watcher:
    return live.Watcher(address)


@st.cache_resource
def _traffic() -> dict[str, Traffic]:
    return {}


def _own_services(settings: DashboardSettings) -> str | None:
    """Start, watch and stop services of this dashboard; the bundle that is chosen, as one would type it."""
    chosen, bundles = None, labels(find_bundles(settings.bundles))
    if bundles:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            chosen = str(st.selectbox("Serve a bundle", list(bundles), key="serve", width=320))
            # A callback: the text of the address's box may only be set before it is drawn.
            st.button(
                "Start", type="primary", icon=":material/play_arrow:", key="start",
                on_click=_start, args=(bundles[chosen],),
            )  # fmt: skip
    failure = st.session_state.pop("live failure", None)
    if failure:
        st.error(plain(failure), icon=":material/error:")
    for service in _services().running():
        with st.container(horizontal=True, vertical_alignment="center", key=f"service {service.url}"):
            st.markdown(f"**{plain(service.bundle.name)}** at {plain(service.url)}", width="content")
            st.button("Watch", icon=":material/visibility:", key=f"watch {service.url}", on_click=_watch,
                      args=(service.url,))  # fmt: skip
            st.button(f"Stop {plain(service.bundle.name)}", icon=":material/stop:", key=f"stop {service.url}",
                      on_click=_services().stop, args=(service.bundle,))  # fmt: skip
    return None if chosen is None else as_typed(bundles[chosen])


def _start(bundle: Path) -> None:
    try:
        _watch(_services().start(bundle).url)
    except (StagelineError, OSError) as error:
        st.session_state["live failure"] = str(error)


def _watch(address: str) -> None:
    st.session_state["url"] = address


@st.fragment(run_every=_REFRESH_S)
def _watched(address: str, range_s: float, bundle: str) -> None:
    samples, error = _watcher(address).look()
    if not samples:
        empty(
            "No service to watch yet",
            f"{str(error)[:1].upper()}{str(error)[1:]}. Start one above, or serve a bundle in a terminal:",
            [f"stageline serve {bundle}"],
        )
        return
    names = live.models(samples[-1])
    model = names[0]
    if len(names) > 1:
        start("model", "model", names, names[0])
        model = str(st.segmented_control("Model", names, required=True, key="model"))
        keep("model", model, names[0])
    stale = None
    if error:
        stale = time.strftime("%H:%M:%S UTC", time.gmtime(samples[-1].at_s))
        st.warning(
            f"{error[:1].upper()}{error[1:]}. What follows is of {stale}, and goes on when the service is back.",
            icon=":material/cloud_off:",
        )
    _cards(live.latest(samples, model), stale)
    if not error and not DashboardSettings.given().read_only:
        _sending(address, model, live.generates(samples[-1], model))
    now_s = time.time() if stale is None else samples[-1].at_s
    found = live.panels(live.thinned(samples, range_s, now_s), model)
    rows = list(live.panel_rows(found, range_s, now_s))
    st.vega_lite_chart(
        charts.panels(rows, found), width="stretch", key=f"live {address} {model}",
        alt=f"{model} at {address} over the last {range_s / 60:.0f} minutes. The cards above have the latest values.",
    )  # fmt: skip
    st.caption(
        "Times are your browser's. A percentile's point is of what ended in the 30 s before it: p50 needs 2 requests, "
        "p90 10, p99 100."
    )


def _cards(now: live.Now, stale: str | None) -> None:
    """The cards; `stale`: the time they are of, if the service is gone."""

    def card(label: str, value: float | None, shown: Callable[[float], str], about: str, few: bool = False) -> None:
        if value is not None or few:
            st.metric(
                label, "-" if value is None else shown(value), f"at {stale}" if stale else None, delta_color="off",
                delta_arrow="off", border=True, help=about, height="stretch",
            )  # fmt: skip

    generates = now.slots is not None
    with st.grid(min_column_width=136, gap="xsmall"):
        unit = "tokens" if generates else "requests"
        card(f"{unit.capitalize()}/s", now.throughput_per_s, words.figure, f"Throughput: {unit} per second.")
        card("Latency p50", now.latency_p50_s, words.seconds, "From request to end. Needs 2 requests.", True)
        card("Latency p99", now.latency_p99_s, words.seconds, "From request to end. Needs 100 requests.", True)
        if generates:
            card("TTFT p50", now.ttft_p50_s, words.seconds, "Time to first token. Needs 2 requests.", True)
            card("TPOT p50", now.tpot_p50_s, words.seconds, "Time per output token after the first.", True)
            card("Queue p50", now.queue_p50_s, words.seconds, "From request to the first step.", True)
        card("Errors", now.errors, lambda v: f"{v:.0f}", "Requests that failed or were refused (HTTP 4xx and 5xx).")
        if generates:
            card("Waiting", now.waiting, lambda v: f"{v:.0f}", "Sequences that wait for a slot, now.")
            card("Slots", now.running, lambda v: f"{v:.0f} of {now.slots:.0f}", "Sequences being generated, now.")
            card("KV cache", now.cache_usage, words.share, "Share of the cache that running sequences fill, now.")
        card("Memory", now.memory_bytes, words.size, "Resident memory of the service's process, now.")
        card("Device memory", now.device_memory_bytes, words.size, "Used on the GPUs of this machine, now.")
        card("Power", now.power_w, lambda v: f"{v:.0f} W", "Power of this machine, as far as it has counters.")
        card("CPU cores", now.cores, lambda v: f"{v:.2f}", "Cores busy on average: CPU seconds per second.")
    st.caption(
        f"Rates and percentiles are of the {'last' if stale is None else 'same'} {now.over_s:.0f} s, in which "
        f"{words.counted(round(now.ended), 'request')} ended. A dash: too few for that figure."
    )


def _sending(address: str, model: str, generates: bool) -> None:
    """Send requests, so that there is something to see."""
    traffic = _traffic().get(address)
    with st.container(horizontal=True, vertical_alignment="center"):
        if traffic is not None and traffic.left_s():
            st.caption(f"Sending requests for {traffic.left_s():.0f} s more.")
            st.button("Stop sending", key="stop sending", on_click=traffic.stop)
            return
        st.button(
            "Send requests for a minute", icon=":material/send:", key="send", on_click=_send,
            args=(address, model, generates), help=f"From {_STREAMS} streams at once.",
        )  # fmt: skip
    if traffic is not None and traffic.refusal is not None:
        st.error(plain(f"{traffic.refusal[:1].upper()}{traffic.refusal[1:]}"), icon=":material/key_off:")


def _send(address: str, model: str, generates: bool) -> None:
    key = str(st.session_state.get("api key", ""))
    _traffic()[address] = Traffic(address, model, generates, _STREAMS, _SECONDS, key)

"""The Plan page: blocks, stages, what crosses each cut, and the effect of moving a cut."""

from pathlib import Path

import streamlit as st
from stageline.dashboard.charts import plan as charts
from stageline.dashboard.children.order import Order
from stageline.dashboard.figures import plan as figures
from stageline.dashboard.settings import DashboardSettings, as_typed
from stageline.dashboard.views import address
from stageline.dashboard.views.common import choose_bundle, code, draw, guarded, page
from stageline.dashboard.views.launching import launcher, profile_shown, profiler
from stageline.dashboard.views.recorded import lines, run_of, store
from stageline.runtime import words
from stageline.runtime.bench.options import checkpoint_digest
from stageline.runtime.bundle.folder import MANIFEST, Bundle
from stageline.runtime.planning.cores import Cores
from stageline.runtime.planning.planner import Answer, Planner
from stageline.runtime.planning.profile import FOLDER, MachineProfile
from stageline.runtime.workload import Workload

_SEARCHED = 200  # runs, for one with the same cut
_TOKENS = 32  # drawn by each request of "Measure this cut"


@page("Plan", "Where a model is cut into stages, and the predicted effect of this cut and of others.")
def show() -> None:
    """Draw the page."""
    folder = choose_bundle()
    if folder is None:
        return
    bundle = _opened(str(folder), (folder / MANIFEST).stat().st_mtime_ns)
    profile, warning = figures.profile_of(folder)
    _facts(bundle)
    place, load = _choices(bundle)
    if place == figures.THIS_MACHINE:
        _profiling(folder, profile, warning)
    layers = _cuts(bundle, place, load)
    if layers is None:
        st.warning(
            "Each cut must lie after the one before: a stage needs at least one block. Move one of them.",
            icon=":material/content_cut:",
        )
        return
    planner = _planner(str(folder), _changed(folder), place, len(layers), load)
    answer = planner.cut(layers)
    best = planner.best("throughput")
    _effect(bundle, planner, answer, best, layers)
    _measured(bundle, answer, layers, load)
    st.subheader("Blocks", anchor=False)
    _blocks(planner, answer)
    left, right = st.columns(2, gap="large")
    with left:
        _crossing(bundle, answer)
    with right:
        _roofline(planner, answer)


def _profiling(folder: Path, profile: MachineProfile | None, warning: str | None) -> None:
    """Whether this machine was measured, and the button that measures it."""
    if profile_shown():
        return
    if profile is None:
        st.info(
            "This machine is not measured yet, so times are guessed: the roofline below says how, and how far "
            "they may be off. Measure it here, or with "
            f"{code(f'stageline profile {as_typed(folder)}')}: under a minute for a small model.",
            icon=":material/timer:",
        )
    elif warning:
        st.warning(warning, icon=":material/warning:")
    if not DashboardSettings.given().read_only and st.button(
        "Profile again" if profile else "Profile", icon=":material/timer:", key="profile",
        help="Measures the model's parts on this machine and stores their times in the bundle.",
    ):  # fmt: skip
        guarded(lambda: _start_profile(folder))


def _start_profile(folder: Path) -> None:
    profiler().start(store(), folder)
    st.rerun()


def _measured(bundle: Bundle, answer: Answer, layers: list[int], load: Workload) -> None:
    """What was measured with this cut, beside what is predicted for it, and the button that measures it."""
    digest = checkpoint_digest(bundle.manifest)
    same = [line for line in lines()[:_SEARCHED] if line.checkpoint == digest and line.headlines]
    found = figures.measured((run_of(line.id) for line in same), layers)
    with st.container(horizontal=True, vertical_alignment="center"):
        if found is None:
            st.markdown("This cut has not been measured.", width="content")
        else:
            predicted = answer.tokens_per_s if found.unit == "tokens" else answer.tokens_per_s / load.length
            st.markdown(
                f"**Measured: {words.rate(found.per_s, found.unit)}** ({found.load}, run {found.run_id}); "
                f"predicted: {words.rate(predicted, found.unit)}, {words.figure(predicted / found.per_s)} times that.",
                width="content",
                help="The prediction is for a pipeline that is always full, with the lengths chosen above.",
            )
            st.page_link(
                st.session_state["pages"]["overview"], label="Overview", query_params={"run": found.run_id},
                icon=":material/speed:", width="content",
            )  # fmt: skip
        if not DashboardSettings.given().read_only and st.button(
            "Measure this cut", icon=":material/play_arrow:", key="measure cut",
            help="A short benchmark of a copy with these stages; the page Run a benchmark shows it.",
        ):  # fmt: skip
            guarded(lambda: _measure(bundle, layers))


def _measure(bundle: Bundle, layers: list[int]) -> None:
    tokens = _TOKENS if bundle.manifest.cached else None
    order = Order(bundle.path, tuple(layers), (), "1,8", seconds=3.0, repeats=2, new_tokens=tokens)
    with st.spinner("Starting"):
        run_id = launcher().start(store(), order)
    st.switch_page(st.session_state["pages"]["run"], query_params={"run": run_id})


@st.cache_resource(max_entries=16, show_spinner=False)
def _opened(folder: str, changed: int) -> Bundle:
    return figures.open_unverified(Path(folder))


@st.cache_resource(max_entries=32, show_spinner="Reading the profile")
def _planner(folder: str, changed: tuple[int, ...], place: str, stages: int, load: Workload) -> Planner:
    bundle = _opened(folder, changed[0])
    return figures.planner_for(bundle, place, stages, load, figures.profile_of(Path(folder))[0])


def _changed(folder: Path) -> tuple[int, ...]:
    """Modification times of the files behind predictions; caches hold until they change."""
    return tuple(f.stat().st_mtime_ns for f in (folder / MANIFEST, *sorted((folder / FOLDER).glob("*.json"))))


def _facts(bundle: Bundle) -> None:
    manifest = bundle.manifest
    kinds = figures.kinds_of_blocks(manifest)
    with st.grid(min_column_width=150, gap="xsmall"):
        st.metric("Parameters", words.count(bundle.parameters), border=True)
        st.metric("Weights", words.size(bundle.weight_bytes), border=True, help=f"as {manifest.dtype}")
        st.metric("Blocks", manifest.blocks, border=True, help=f"of {words.counted(kinds, 'kind')}")
        now = ", ".join(map(str, manifest.layers))
        st.metric("Current stages", len(manifest.stages), border=True, help=f"of {now} blocks")
    st.caption(
        f"{manifest.architecture}, {manifest.task}, {manifest.dtype}. {manifest.trace[:1].upper()}{manifest.trace[1:]}."
    )


def _choices(bundle: Bundle) -> tuple[str, Workload]:
    manifest = bundle.manifest
    places = figures.places()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        address.start("device", "device", places, places[0])
        place = str(st.selectbox("Device of each stage", places, key="device", width=220))
        address.keep("device", place, places[0])
        limit = manifest.max_positions or 2048
        if manifest.cached:
            slots = _number("Slots (requests at a time)", "slots", "slots", 1, 512, 8)
            capacity = _number("Capacity (tokens per slot)", "capacity", f"capacity {limit}", 2, limit, min(512, limit))
            return place, Workload(slots=slots, capacity=capacity)
        rows = _number("Rows per micro-batch", "rows", "rows", 1, 512, 8)
        length = _number("Tokens per row", "length", f"length {limit}", 1, limit, min(128, limit))
        return place, Workload(micro_batch=rows, length=length)


def _number(label: str, name: str, key: str, low: int, high: int, default: int) -> int:
    """A box of a number that the address holds as `name`."""
    address.restore_number(name, key, default, int)
    st.session_state[key] = min(max(st.session_state[key], low), high)
    value = int(st.number_input(label, low, high, key=key, width=200))
    address.keep(name, str(value), str(default))
    return value


def _cuts(bundle: Bundle, place: str, load: Workload) -> list[int] | None:
    """The number of blocks of each stage, from the sliders; None where they cross."""
    manifest = bundle.manifest
    counts = [str(n) for n in range(1, figures.max_stages(manifest, place, load) + 1)]
    now = list(manifest.layers)
    asked = [int(one) for one in st.query_params.get("cuts", "").split(",") if one.isdigit()]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        default = counts[min(len(now), len(counts)) - 1]
        key = f"stages of {bundle.path} up to {len(counts)}"
        address.start("stages", key, counts, default)
        count = int(str(st.segmented_control("Stages", counts, required=True, key=key)))
        address.keep("stages", str(count), default)
        even = [round(n * manifest.blocks / count) for n in range(1, count)]
        start = [sum(now[:n]) for n in range(1, count)] if count == len(now) else even
        cuts = []
        for number, at in enumerate(start):
            label = "Cut before block" if count == 2 else f"Cut {number + 1} before block"
            key = f"cut {number} of {count} of {bundle.path}"
            if key not in st.session_state:
                given = asked[number] if len(asked) == len(start) else at
                st.session_state[key] = min(max(given, 1), manifest.blocks - 1)
            cuts.append(int(st.slider(label, 1, manifest.blocks - 1, key=key, width=max(180, 600 // count))))
    address.keep("cuts", ",".join(map(str, cuts)), ",".join(map(str, start)))
    return figures.layers_between(cuts, manifest.blocks)


def _effect(bundle: Bundle, planner: Planner, answer: Answer, best: Answer, layers: list[int]) -> None:
    now = list(bundle.manifest.layers)
    same = len(now) == len(layers)
    before = planner.cut(now) if same and now != layers else None
    per_s = answer.tokens_per_s
    with st.grid(min_column_width=190, gap="xsmall"):
        gain = words.change(per_s / before.tokens_per_s - 1) if before else None
        st.metric(
            "Predicted throughput", words.rate(per_s, "tokens"), gain, border=True,
            delta_description="against the bundle's cut" if gain else None,
        )  # fmt: skip
        cycle = answer.cycle_s if answer.shape.past else answer.plan.latency_s
        cycle_before = None if before is None else before.cycle_s if before.shape.past else before.plan.latency_s
        st.metric(
            "Time per token" if answer.shape.past else "Latency of a micro-batch",
            words.seconds(cycle),
            words.change(cycle / cycle_before - 1) if cycle_before else None,
            delta_color="inverse",
            border=True,
        )
        bubble = figures.bubble_ratio(answer)
        st.metric(
            "Bubble ratio",
            words.share(bubble),
            f"{100 * (bubble - figures.bubble_ratio(before)):+.1f} points" if before else None,
            delta_color="inverse",
            border=True,
            help="The share of the stages' time spent waiting for the slowest stage.",
        )
        chosen = [stage.end - stage.first for stage in best.plan.stages]
        ahead = best.tokens_per_s / per_s - 1
        st.metric(
            "The planner's cut",
            ", ".join(map(str, chosen)),
            "this is it" if chosen == layers else f"{words.change(ahead)} tokens/s",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="Blocks of each stage that reach the most tokens/s on at most as many devices.",
        )
    memory = answer.problem.devices[0].memory_bytes
    for row in figures.stage_rows(answer):
        if row["memory_mb"] * 1e6 > memory:
            st.warning(
                f"{row['stage']} needs {words.size(row['memory_mb'] * 1e6)}; the device has {words.size(memory)}.",
                icon=":material/warning:",
            )
    left, right = st.columns(2, gap="large")
    if len(layers) > 1:
        with left:
            st.subheader("Moving a cut", anchor=False)
            which = 0
            if len(layers) > 2:
                known = [str(n) for n in range(1, len(layers))]
                address.start("cut", f"which cut of {len(known)}", known, "1")
                picked = str(st.segmented_control("Cut", known, required=True, key=f"which cut of {len(known)}"))
                address.keep("cut", picked, "1")
                which = int(picked) - 1
            rows = figures.moved(planner, layers, which)
            optimum = max(rows, key=lambda row: float(row["tokens_per_s"]))["cut"]
            here = sum(layers[: which + 1])
            draw(
                charts.cut_curve(rows, here, optimum), "chart-cut",
                f"Predicted tokens/s for each place of this cut; it is before block {here}, best before {optimum}.",
            )  # fmt: skip
            st.caption("The ring marks the best place for this cut, the dashed line its current place.")
    with right if len(layers) > 1 else left:
        st.subheader("Stages", anchor=False)
        shares = "; ".join(f"{r['stage']}: {r['compute_ms']:.3g} ms computing" for r in figures.stage_rows(answer))
        draw(charts.stages(figures.stage_rows(answer)), "chart-stages", f"Time per micro-batch. {shares}.")
    if layers != now:
        st.caption("This page changes nothing. To cut the bundle like this:")
        st.code(
            f"stageline recut {as_typed(bundle.path)} --layers {','.join(map(str, layers))}",
            language="bash",
            wrap_lines=True,
        )


def _blocks(planner: Planner, answer: Answer) -> None:
    address.start("show", "measure", list(charts.MEASURES), "Time")
    measure = str(
        st.segmented_control(
            "What to show", list(charts.MEASURES), required=True, key="measure", label_visibility="collapsed"
        )
    )
    address.keep("show", measure, "Time")
    rows = figures.block_rows(planner, answer)
    draw(charts.blocks(rows, measure), "chart-blocks", f"{measure} of each of {len(rows)} parts.")


def _crossing(bundle: Bundle, answer: Answer) -> None:
    st.subheader("What crosses each cut", anchor=False)
    rows = figures.crossing_rows(bundle, answer)
    if not rows:
        st.caption("There is one stage, so nothing crosses.")
        return
    total = words.size(sum(row["bytes"] for row in rows))
    st.dataframe(
        [{**row, "bytes": words.size(row["bytes"])} for row in rows],
        hide_index=True,
        column_config={"bytes": st.column_config.TextColumn("size", help="for this micro-batch")},
    )
    shape = answer.shape
    past = f", {shape.past:,} tokens in the cache" if shape.past else ""
    st.caption(f"In all {total} for a micro-batch of {shape.batch} × {words.counted(shape.length, 'token')}{past}.")


def _roofline(planner: Planner, answer: Answer) -> None:
    st.subheader("Roofline", anchor=False)
    line = figures.roofline(planner, answer)
    bounds = ", ".join(f"{row['stage']} by {row['bound']}" for row in line.stages)
    draw(charts.roofline(figures.roof_points(line), line.stages), "chart-roofline", f"Stages are bound: {bounds}.")
    kind = planner.cluster.kinds[0]
    source = "published figures times an efficiency"
    if planner.profile:
        source = "fitted to this machine's profile"
    elif isinstance(kind.device, Cores):
        source = kind.device.source
    st.caption(f"Bounds: {bounds}. Roof: {source}.")

"""The Plan page: blocks, stages, what crosses each cut, and the effect of moving a cut."""

from pathlib import Path

import streamlit as st
from stageline.dashboard.charts import plan as charts
from stageline.dashboard.figures import plan as figures
from stageline.dashboard.settings import as_typed
from stageline.dashboard.views.common import choose_bundle, page
from stageline.runtime import words
from stageline.runtime.bundle.folder import MANIFEST, Bundle
from stageline.runtime.planning.planner import Answer, Planner
from stageline.runtime.planning.profile import FOLDER, MachineProfile
from stageline.runtime.workload import Workload


@page("Plan", "Where a model is cut into stages, and the predicted effect of this cut and of others.")
def show() -> None:
    """Draw the page."""
    folder = choose_bundle()
    if folder is None:
        return
    bundle = _opened(str(folder), (folder / MANIFEST).stat().st_mtime_ns)
    profile, warning = figures.profile_of(folder)
    _facts(bundle)
    if profile is None:
        st.info(
            f"This machine has not been measured, so predictions are for published devices. Measure it with "
            f"`stageline profile {as_typed(folder)}`.",
            icon=":material/timer:",
        )
    elif warning:
        st.warning(warning, icon=":material/warning:")
    place, load = _choices(bundle, profile)
    layers = _cuts(bundle, place, load)
    if layers is None:
        st.warning("Two cuts are at the same block: a stage needs at least one block.", icon=":material/content_cut:")
        return
    planner = _planner(str(folder), _changed(folder), place, len(layers), load)
    answer = planner.cut(layers)
    best = planner.best("throughput")
    _effect(bundle, planner, answer, best, layers)
    st.subheader("Blocks", anchor=False)
    _blocks(planner, answer)
    left, right = st.columns(2, gap="large")
    with left:
        _crossing(bundle, answer)
    with right:
        _roofline(planner, answer)
    _reports(folder)


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
    with st.container(horizontal=True):
        st.metric("Parameters", words.count(bundle.parameters), border=True)
        st.metric("Weights", words.size(bundle.weight_bytes), border=True, help=f"as {manifest.dtype}")
        st.metric("Blocks", manifest.blocks, border=True, help=f"of {words.counted(kinds, 'kind')}")
        now = ", ".join(map(str, figures.layers_of(manifest)))
        st.metric("Current stages", len(manifest.stages), border=True, help=f"of {now} blocks")
    st.caption(
        f"{manifest.architecture}, {manifest.task}, {manifest.dtype}. {manifest.trace[:1].upper()}{manifest.trace[1:]}."
    )


def _choices(bundle: Bundle, profile: MachineProfile | None) -> tuple[str, Workload]:
    manifest = bundle.manifest
    with st.container(horizontal=True, vertical_alignment="bottom"):
        place = st.selectbox("Device of each stage", figures.places(profile), key="device", width=220)
        limit = manifest.max_positions or 2048
        if manifest.cached:
            slots = st.number_input("Slots (requests at a time)", 1, 512, 8, key="slots", width=200)
            capacity = st.number_input(
                "Capacity (tokens per slot)", 2, limit, min(512, limit), step=64, key=f"capacity of {limit}", width=200
            )
            return place, Workload(slots=int(slots), capacity=int(capacity))
        rows = st.number_input("Rows per micro-batch", 1, 512, 8, key="rows", width=200)
        length = st.number_input(
            "Tokens per row", 1, limit, min(128, limit), step=16, key=f"length of {limit}", width=200
        )
        return place, Workload(micro_batch=int(rows), length=int(length))


def _cuts(bundle: Bundle, place: str, load: Workload) -> list[int] | None:
    """The number of blocks of each stage, from the sliders."""
    manifest = bundle.manifest
    limit = figures.max_stages(manifest, place, load)
    now = figures.layers_of(manifest)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        options = list(range(1, limit + 1))
        default = min(len(now), limit)
        stages = st.segmented_control(
            "Stages", options, default=default, required=True, key=f"stages of {bundle.path} up to {limit}"
        )
        count = int(stages or default)
        even = [round(n * manifest.blocks / count) for n in range(1, count)]
        start = [sum(now[:n]) for n in range(1, count)] if count == len(now) else even
        cuts = []
        for number, at in enumerate(start):
            label = "Cut before block" if count == 2 else f"Cut {number + 1} before block"
            key = f"cut {number} of {count} of {bundle.path}"
            cuts.append(st.slider(label, 1, manifest.blocks - 1, at, key=key, width=max(180, 600 // count)))
    return figures.layers_between(cuts, manifest.blocks)


def _effect(bundle: Bundle, planner: Planner, answer: Answer, best: Answer, layers: list[int]) -> None:
    now = figures.layers_of(bundle.manifest)
    same = len(now) == len(layers)
    before = planner.cut(now) if same and now != layers else None
    per_s = answer.tokens_per_s
    with st.container(horizontal=True):
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
                picked = st.segmented_control(
                    "Cut", list(range(1, len(layers))), default=1, required=True, key="which cut"
                )
                which = int(picked or 1) - 1
            rows = figures.moved(planner, layers, which)
            optimum = max(rows, key=lambda row: float(row["tokens_per_s"]))["cut"]
            chart = charts.cut_curve(rows, sum(layers[: which + 1]), optimum)
            st.vega_lite_chart(chart, width="stretch", key="chart-cut")
            st.caption("The ring marks the best place for this cut, the dashed line its current place.")
    with right if len(layers) > 1 else left:
        st.subheader("Stages", anchor=False)
        st.vega_lite_chart(charts.stages(figures.stage_rows(answer)), width="stretch", key="chart-stages")
    if layers != now:
        st.caption("This page changes nothing. To cut the bundle like this:")
        st.code(
            f"stageline recut {as_typed(bundle.path)} --layers {','.join(map(str, layers))}",
            language="bash",
            wrap_lines=True,
        )


def _blocks(planner: Planner, answer: Answer) -> None:
    measure = st.segmented_control(
        "What to show",
        list(charts.MEASURES),
        default="Time",
        required=True,
        key="measure",
        label_visibility="collapsed",
    )
    rows = figures.block_rows(planner, answer)
    st.vega_lite_chart(charts.blocks(rows, str(measure or "Time")), width="stretch", key="chart-blocks")


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
    st.vega_lite_chart(charts.roofline(figures.roof_points(line), line.stages), width="stretch", key="chart-roofline")
    bounds = ", ".join(f"{row['stage']} by {row['bound']}" for row in line.stages)
    source = "fitted to this machine's profile" if planner.profile else "published figures times an efficiency"
    st.caption(f"Bounds: {bounds}. Roof: {source}.")


def _reports(folder: Path) -> None:
    st.subheader("Engines", anchor=False)
    reports = figures.engine_reports(folder)
    if not reports:
        st.caption(
            "None built yet: stages run on ONNX Runtime. `stageline build` compiles them with TensorRT, without a GPU."
        )
        return
    st.dataframe([report.row for report in reports], hide_index=True, height="content", key="engines")
    for report in reports:
        if report.kinds:
            with st.expander(f"Layers of {report.row['stage']}, {report.row['engine']}, {report.row['target']}"):
                st.dataframe(
                    [{"kind": kind, "layers": number} for kind, number in report.kinds.items()], hide_index=True
                )

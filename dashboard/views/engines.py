"""The Engines page: what the engines inside the stages spend time and memory on, two of them side by side."""

from pathlib import Path
from typing import get_args

import streamlit as st
from stageline.dashboard.charts import engines as charts
from stageline.dashboard.figures import engines as figures
from stageline.dashboard.settings import DashboardSettings, as_typed, usable_engines
from stageline.dashboard.views import address
from stageline.dashboard.views.common import choose_bundle, draw, empty, guarded, page
from stageline.dashboard.views.launching import profile_shown, profiler
from stageline.dashboard.views.recorded import store
from stageline.runtime import words
from stageline.runtime.bundle.folder import read_manifest
from stageline.runtime.bundle.manifest import Manifest
from stageline.runtime.engines import WeightDtype
from stageline.runtime.layers.engines import TIMED
from stageline.runtime.layers.profile import LayerProfile, StepTimes, read_layers

_NONE = "none"


@page("Engines", "What the engines inside the stages spend their time and memory on, layer by layer.")
def show() -> None:
    """Draw the page."""
    folder = choose_bundle()
    if folder is None:
        return
    manifest = read_manifest(folder)
    profiles, unread = read_layers(folder)
    for line in unread:
        st.warning(line, icon=":material/warning:")
    if not profile_shown():
        _time(folder)
    if profiles:
        _timed(manifest, figures.named(profiles))
    else:
        empty(
            "No layers are timed yet",
            "Time those of an engine above, or in a terminal; it takes seconds for a small model.",
            [f"stageline layers {as_typed(folder)}"],
        )
    _built(folder)


def _time(folder: Path) -> None:
    """The button that times an engine's layers."""
    known = [name for name in usable_engines() if name in TIMED]
    if DashboardSettings.given().read_only or not known:
        return
    weights = ["", *get_args(WeightDtype)]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        engine = str(st.selectbox("Engine to time", known, key="engine to time", width=200))
        quantise = str(
            st.selectbox("Quantise", weights, format_func=lambda one: one or "no", key="timed as", width=140)
        )
        if st.button(
            "Time its layers", icon=":material/timer:", key="time layers",
            help="Runs the stages on random inputs, and stores the times in the bundle; as stageline layers does.",
        ):  # fmt: skip
            options = ["--engine", engine, *(["--quantise", quantise] if quantise else [])]
            guarded(lambda: _start(folder, options))


def _start(folder: Path, options: list[str]) -> None:
    profiler().start(store(), folder, "layers", options)
    st.rerun()


def _timed(manifest: Manifest, profiles: dict[str, LayerProfile]) -> None:
    """The chosen profile, beside another one if there is one."""
    names = list(profiles)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        first = _chosen("Engine", "engine", names, names[0])
        others = [_NONE, *(name for name in names if name != first)]
        second = _chosen("Beside", "beside", others, others[min(1, len(others) - 1)])
        shapes = figures.steps(profiles[first])
        shape = _chosen("Micro-batch", "batch", list(shapes), next(iter(shapes)))
    shown = {first: profiles[first]}
    if second != _NONE:
        shown[second] = profiles[second]
    for name, profile in shown.items():
        if figures.stale(profile, manifest.layers):
            st.warning(
                f"{name} was timed with stages of {' + '.join(map(str, profile.blocks))} blocks; the bundle has "
                f"{' + '.join(map(str, manifest.layers))} now. Time it again.",
                icon=":material/content_cut:",
            )  # fmt: skip
    steps = {name: found for name, one in shown.items() if (found := figures.steps(one).get(shape)) is not None}
    for name in shown.keys() - steps.keys():
        st.caption(f"{name} was not timed with {shape}.")
    _sentence({name: shown[name] for name in steps}, steps, shape)
    _facts(shown, steps)
    st.subheader("What the time goes to", anchor=False)
    rows = figures.family_rows(steps)
    said = ", ".join(f"{row['family']} in {row['engine']} {words.seconds(row['seconds'])}" for row in rows)
    draw(charts.families(rows, figures.colours({name: shown[name] for name in steps})), "chart-families",
         f"Time of each family of layers: {said}.")  # fmt: skip
    for name, step in steps.items():
        _heaviest(name, step)


def _chosen(label: str, name: str, options: list[str], default: str) -> str:
    """A box whose choice the address holds."""
    key = f"{name} of {len(options)}"
    address.start(name, key, options, default)
    chosen = str(st.selectbox(label, options, key=key, width=280))
    address.keep(name, chosen, default)
    return chosen


def _sentence(profiles: dict[str, LayerProfile], steps: dict[str, StepTimes], shape: str) -> None:
    """The main finding."""
    (first, step), *rest = steps.items()
    (heaviest,) = figures.layer_rows(step, 1)
    took, where = words.seconds(step.seconds), figures.place(profiles[first])
    texts = [
        f"**{first} takes {took} for {shape}**, on {where}, stage after stage. The heaviest layer is "
        f"`{heaviest['layer']}` ({heaviest['kind']}), {heaviest['share']:.1f} % of the time in layers."
    ]
    for second, other in rest:
        reason = figures.unlike(profiles[first], profiles[second])
        ratio = words.figure(step.seconds / other.seconds)
        texts.append(
            f"It is not compared with {second}: {reason}." if reason else f"That is {ratio} times the time of {second}."
        )
    st.markdown(" ".join(texts))
    st.caption(
        f"Means of {step.runs} runs after a warm-up, one measurement: no interval. Timing layers slows them down a "
        "little. Whether one engine serves faster says a benchmark: the page Run a benchmark."
    )


def _facts(profiles: dict[str, LayerProfile], steps: dict[str, StepTimes]) -> None:
    columns = {name: figures.facts(profiles[name], step) for name, step in steps.items()}
    first = next(iter(columns.values()))
    rows = [{"": what, **{name: column[what] for name, column in columns.items()}} for what in first]
    st.dataframe(rows, hide_index=True, height="content", key="facts")


def _heaviest(name: str, step: StepTimes) -> None:
    st.subheader(f"The heaviest layers of {name}", anchor=False)
    share = {
        "share": st.column_config.ProgressColumn("share (%)", format="%.1f", min_value=0.0, max_value=100.0),
    }
    rows = figures.layer_rows(step, figures.HEAVIEST)
    st.dataframe(rows, hide_index=True, height="content", column_config=share, key=f"heaviest of {name}")
    every = figures.layer_rows(step, None)
    if len(every) > len(rows):
        with st.expander(f"All {len(every)} layers of {name}"):
            st.dataframe(every, hide_index=True, column_config=share, key=f"layers of {name}")


def _built(folder: Path) -> None:
    """The engines that were built ahead."""
    st.subheader("Built ahead, with TensorRT", anchor=False)
    reports = figures.engine_reports(folder)
    if not reports:
        st.caption("None. `stageline build` compiles the stages for a GPU, without one.")
        return
    st.dataframe([report.row for report in reports], hide_index=True, height="content", key="engines")
    for report in reports:
        if report.kinds:
            with st.expander(f"Layers of {report.row['stage']}, {report.row['engine']}, {report.row['target']}"):
                st.dataframe(
                    [{"kind": kind, "layers": number} for kind, number in report.kinds.items()], hide_index=True
                )

"""Charts of the Plan page: blocks, the effect of a cut, stages, the roofline."""

from typing import Any

import altair as alt
from stageline.dashboard.charts.base import GREY, Chart, Rows, of

_LOG = alt.Scale(type="log", nice=False, padding=12)
MEASURES = {
    "Time": ("ms", "time for a micro-batch (ms)"),
    "Parameters": ("parameters_m", "parameters (millions)"),
    "Memory": ("memory_mb", "weights and cache (MB)"),
}
"""What the chart of blocks can show: column, axis title."""


def blocks(rows: Rows, measure: str) -> Chart:
    """A bar for each block, prologue and epilogue, coloured by stage."""
    column, title = MEASURES[measure]
    names = [row["name"] for row in rows]
    every = max(1, -(-len(names) // 24))
    shown = [name for n, name in enumerate(names) if n % every == 0 or n == len(names) - 1]
    return (
        of(rows)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("name:N", sort=names, title=None, axis=alt.Axis(values=shown, labelAngle=-45)),
            y=alt.Y(f"{column}:Q", title=title),
            color=alt.Color("stage:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=[
                alt.Tooltip("name:N", title="part"),
                alt.Tooltip("stage:N", title="stage"),
                alt.Tooltip("ms:Q", title="time (ms)", format=".3f"),
                alt.Tooltip("gflop:Q", title="operations (GFLOP)", format=",.3f"),
                alt.Tooltip("parameters_m:Q", title="parameters (millions)", format=",.3f"),
                alt.Tooltip("weights_mb:Q", title="weights (MB)", format=",.1f"),
                alt.Tooltip("cache_mb:Q", title="cache (MB)", format=",.1f"),
            ],
        )
        .properties(height=260)
    )


def cut_curve(rows: Rows, at: int, best: int | None) -> Chart:
    """Predicted tokens a second for every place of one cut; a rule where it is, a ring where the planner would cut."""
    x = alt.X("cut:Q", title="first block of the later stage", axis=alt.Axis(tickMinStep=1, format="d", grid=False))
    y = alt.Y("tokens_per_s:Q", title="predicted tokens/s", scale=alt.Scale(zero=True))
    tooltip = [
        alt.Tooltip("cut:Q", title="cut before block"),
        alt.Tooltip("tokens_per_s:Q", title="tokens/s", format=",.1f"),
        alt.Tooltip("bubble:Q", title="bubble ratio", format=".1%"),
    ]
    base = of(rows)
    layers: list[Any] = [
        base.mark_line(point=alt.OverlayMarkDef(size=36)).encode(x=x, y=y, tooltip=tooltip),
        base.transform_filter(f"datum.cut == {at}").mark_rule(color=GREY, strokeDash=[4, 3]).encode(x=x),
        base.transform_filter(f"datum.cut == {at}").mark_point(size=170, filled=True).encode(x=x, y=y, tooltip=tooltip),
    ]
    if best is not None:
        ring = base.transform_filter(f"datum.cut == {best}").mark_point(size=320, strokeWidth=2.5, color="#E69F00")
        layers.append(ring.encode(x=x, y=y, tooltip=tooltip))
    return alt.layer(*layers).properties(height=240)


def stages(rows: Rows) -> Chart:
    """What each stage does with the time between two micro-batches: compute, copy, wait."""
    words = [("compute_ms", "computing"), ("copy_ms", "copying in"), ("wait_ms", "waiting (bubble)")]
    long = [
        {"stage": row["stage"], "blocks": row["blocks"], "what": word, "order": order, "ms": row[column]}
        for row in rows
        for order, (column, word) in enumerate(words)
    ]
    return (
        of(long)
        .mark_bar(cornerRadius=2)
        .encode(
            y=alt.Y("stage:N", title=None, sort=[row["stage"] for row in rows]),
            x=alt.X("ms:Q", title="time for a micro-batch (ms)", stack="zero"),
            color=alt.Color("what:N", title=None, sort=[w for _, w in words], legend=alt.Legend(orient="top")),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("stage:N"),
                alt.Tooltip("blocks:N"),
                alt.Tooltip("what:N", title="what"),
                alt.Tooltip("ms:Q", title="time (ms)", format=".3f"),
            ],
        )
        .properties(height=120 + 40 * len(rows))
    )


def roofline(roof: Rows, stage_points: Rows) -> Chart:
    """Attained operations a second over intensity, both logarithmic, under the roof of the device."""
    x = alt.X("intensity:Q", title="intensity (operations/byte)", scale=_LOG)
    y = alt.Y("gflop_per_s:Q", title="rate (GFLOP/s)", scale=_LOG)
    line = of(roof).mark_line(color=GREY, strokeWidth=2).encode(x=x, y=y)
    points = (
        of(stage_points)
        .mark_point(size=180, filled=True, opacity=0.95)
        .encode(
            x=x,
            y=y,
            color=alt.Color("stage:N", title=None, legend=alt.Legend(orient="top")),
            shape=alt.Shape("stage:N", title=None),
            tooltip=[
                alt.Tooltip("stage:N"),
                alt.Tooltip("intensity:Q", title="operations/byte", format=",.1f"),
                alt.Tooltip("gflop_per_s:Q", title="GFLOP/s", format=",.1f"),
                alt.Tooltip("share:Q", title="of the roof", format=".0%"),
                alt.Tooltip("bound:N", title="bound by"),
            ],
        )
    )
    return alt.layer(line, points).properties(height=280)

"""The Timeline page's charts: a Gantt of the stages with their bubbles, and utilisation over the whole."""

from collections.abc import Sequence

import altair as alt
from stageline.dashboard.charts.base import GREY, Chart, Rows, of

_LEGEND = alt.Legend(orient="top", symbolStrokeWidth=0)
KINDS = ("batch", "prefill", "decode", "copy")


def gantt(spans: Rows, bubbles: Rows, stages: Sequence[str], window_ms: tuple[float, float]) -> Chart:
    """A lane for each stage; wheel and drag zoom and move the time axis."""
    zoom = alt.selection_interval(bind="scales", encodings=["x"], name="zoom")
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in spans)]
    x = alt.X(
        "begin_ms:Q",
        title="time since the measurement began (ms)",
        scale=alt.Scale(domain=list(window_ms), nice=False, zero=False),
        axis=alt.Axis(format=",~r"),
    )
    y = alt.Y("stage:N", title=None, sort=list(stages), scale=alt.Scale(domain=list(stages), paddingInner=0.25))
    times = [
        alt.Tooltip("ms:Q", title="took (ms)", format=",.3f"),
        alt.Tooltip("begin_ms:Q", title="began at (ms)", format=",.3f"),
    ]
    idle = (
        of(bubbles)
        .mark_rect(fill=GREY, fillOpacity=0.18, stroke=GREY, strokeDash=[3, 2], strokeWidth=1, clip=True)
        .encode(
            x=x,
            x2="end_ms:Q",
            y=y,
            tooltip=[alt.Tooltip("stage:N"), alt.Tooltip("kind:N", title="waits"), *times],
        )
    )
    work = (
        of(spans)
        .mark_rect(cornerRadius=2, clip=True, stroke="white", strokeWidth=0.4)
        .encode(
            x=x,
            x2="end_ms:Q",
            y=y,
            color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds), legend=_LEGEND),
            tooltip=[
                alt.Tooltip("stage:N"),
                alt.Tooltip("kind:N", title="what"),
                alt.Tooltip("shape:N", title="micro-batch"),
                alt.Tooltip("micro_batch:Q", title="number"),
                alt.Tooltip("requests:N"),
                *times,
            ],
        )
        .add_params(zoom)
    )
    return alt.layer(idle, work).properties(height=130 + 52 * len(stages))


def utilisation(rows: Rows, window_s: tuple[float, float]) -> Chart:
    """Each stage over the whole recording; the band is the window that the Gantt shows."""
    band = (
        of([{"low": window_s[0], "high": window_s[1]}])
        .mark_rect(fill=GREY, fillOpacity=0.25)
        .encode(x="low:Q", x2="high:Q")
    )
    lines = (
        of(rows)
        .mark_line(strokeWidth=1.5, interpolate="step")
        .encode(
            x=alt.X("at_s:Q", title="time since the measurement began (s)", scale=alt.Scale(nice=False, zero=False)),
            y=alt.Y("percent:Q", title="utilisation (%)", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("stage:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=[
                alt.Tooltip("stage:N"),
                alt.Tooltip("at_s:Q", title="at (s)", format=",.2f"),
                alt.Tooltip("percent:Q", title="utilisation (%)", format=".0f"),
            ],
        )
    )
    return alt.layer(band, lines).properties(height=190)

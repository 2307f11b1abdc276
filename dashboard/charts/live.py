"""The Live page's charts: lines over the last minutes."""

import altair as alt
import pandas as pd
from stageline.dashboard.charts.base import Chart
from stageline.dashboard.live import KEPT_S


def lines(rows: pd.DataFrame, title: str, names: list[str], top: float | None = None, form: str = ",.1f") -> Chart:
    """A line for each name; `rows` have ago_s, value and line. The same spec each time, so that only data move."""
    scale = alt.Scale(domainMin=0, domainMax=top) if top is not None else alt.Scale(domainMin=0)
    legend = alt.Legend(orient="top") if len(names) > 1 else None
    return (
        alt.Chart(rows)
        .mark_line(strokeWidth=2, interpolate="monotone", clip=True)
        .encode(
            x=alt.X("ago_s:Q", title="time (s, 0 is now)", scale=alt.Scale(domain=[-KEPT_S, 0], nice=False)),
            y=alt.Y("value:Q", title=title, scale=scale),
            color=alt.Color("line:N", title=None, sort=names, scale=alt.Scale(domain=names), legend=legend),
            strokeDash=alt.StrokeDash("line:N", title=None, sort=names, scale=alt.Scale(domain=names), legend=legend),
            tooltip=[
                alt.Tooltip("line:N", title=" "),
                alt.Tooltip("value:Q", title=title, format=form),
                alt.Tooltip("ago_s:Q", title="s ago"),
            ],
        )
        .properties(height=220)
    )

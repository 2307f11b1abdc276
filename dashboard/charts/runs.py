"""Charts of recorded runs: throughput against latency, baselines, stages, ladders, distributions."""

from collections.abc import Sequence
from typing import Any

import altair as alt
from stageline.dashboard.charts.base import GREY, Chart, Rows, of

_SQUARES = alt.Legend(orient="top", columns=1, symbolType="square", symbolOpacity=1)
_LOG = alt.Scale(type="log", nice=False, padding=12)


def curve(rows: Rows, unit: str, percentile: str, slo_ms: float | None, contenders: Sequence[str]) -> Chart:
    """Latency over throughput: to the right and down is better. The SLO is a dashed line."""
    x = alt.X("throughput:Q", title=f"throughput ({unit})", scale=alt.Scale(zero=True))
    y = alt.Y("latency_ms:Q", title=f"latency {percentile} (ms)", scale=_LOG)
    color = alt.Color("contender:N", title=None, sort=list(contenders), legend=alt.Legend(orient="top", columns=3))
    base = of(rows)
    lines = (
        base.transform_filter("datum.sweep != null")
        .mark_line(strokeWidth=2, opacity=0.8)
        .encode(x=x, y=y, color=color, detail="sweep:N", order="order:Q")
    )
    points = base.mark_point(size=90, filled=True, opacity=1).encode(
        x=x,
        y=y,
        color=color,
        shape=alt.Shape("contender:N", title=None, sort=list(contenders)),
        tooltip=[
            alt.Tooltip("contender:N"),
            alt.Tooltip("load:N"),
            alt.Tooltip("throughput:Q", title=f"throughput ({unit})", format=",.1f"),
            alt.Tooltip("latency_ms:Q", title=f"latency {percentile} (ms)", format=",.1f"),
        ],
    )
    layers: list[Any] = [lines, points]
    if slo_ms is not None:
        bound = of([{"slo_ms": slo_ms, "told": f"SLO {slo_ms:g} ms"}])
        rule = bound.mark_rule(strokeDash=[6, 4], color="#D55E00", strokeWidth=1.5)
        text = bound.mark_text(align="left", dx=4, dy=-7, color="#D55E00", x=0)
        layers += [rule.encode(y="slo_ms:Q"), text.encode(y="slo_ms:Q", text="told:N")]
    return alt.layer(*layers).properties(height=330)


def baselines(rows: Rows, unit: str) -> Chart:
    """A bar for each contender, with its 95 % confidence interval."""
    names = [row["contender"] for row in sorted(rows, key=lambda row: -float(row["throughput"]))]
    base = of(rows)
    y = alt.Y("contender:N", title=None, sort=names, axis=alt.Axis(labelLimit=180))
    x = alt.X("throughput:Q", title=f"throughput ({unit})")
    bars = base.mark_bar(cornerRadiusEnd=3).encode(
        x=x,
        y=y,
        color=alt.condition("datum.contender == 'stageline'", alt.value("#0072B2"), alt.value(GREY)),
        tooltip=[
            alt.Tooltip("contender:N"),
            alt.Tooltip("load:N"),
            alt.Tooltip("throughput:Q", title=f"throughput ({unit})", format=",.1f"),
            alt.Tooltip("told:N", title=" "),
        ],
    )
    reach = base.mark_rule(strokeWidth=2, color="#D55E00").encode(x="low:Q", x2="high:Q", y=y)
    return alt.layer(bars, reach).properties(height=80 + 38 * len(rows))


def stages(rows: Rows) -> Chart:
    """What each stage did with its time."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    words = ["computing", "copying in", "waiting"]
    return (
        of(rows)
        .mark_bar(cornerRadius=2)
        .encode(
            y=alt.Y("stage:N", title=None, sort=names),
            x=alt.X("percent:Q", title="share of the measured time (%)", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("what:N", title=None, sort=words, legend=alt.Legend(orient="top")),
            order="order:Q",
            tooltip=[
                alt.Tooltip("stage:N"),
                alt.Tooltip("device:N"),
                alt.Tooltip("blocks:Q"),
                alt.Tooltip("what:N", title="what"),
                alt.Tooltip("percent:Q", title="share (%)", format=".1f"),
                alt.Tooltip("seconds:Q", title="time (s)", format=",.2f"),
            ],
        )
        .properties(height=120 + 40 * len(names))
    )


def ladder(rows: Rows, title: str, runs: Sequence[str]) -> Chart:
    """Times by percentile; the axis spreads the slow end as nines do."""
    marks = "['p0', 'p90', 'p99', 'p99.9', 'p99.99'][datum.value]"
    return (
        of(rows)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X(
                "nines:Q",
                title="percentile",
                scale=alt.Scale(domain=[0, 4]),
                axis=alt.Axis(values=[0, 1, 2, 3, 4], labelExpr=marks),
            ),
            y=alt.Y("ms:Q", title=title, scale=_LOG),
            color=alt.Color("run:N", title=None, sort=list(runs), legend=alt.Legend(orient="top", columns=1)),
            strokeDash=alt.StrokeDash("run:N", title=None, sort=list(runs)),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("percentile:Q", format=".2f"),
                alt.Tooltip("ms:Q", title=title, format=",.2f"),
            ],
        )
        .properties(height=300)
    )


def histogram(rows: Rows, runs: Sequence[str]) -> Chart:
    """Shares of requests by latency, a step line for each run."""
    return (
        of(rows)
        .mark_area(interpolate="step-after", opacity=0.28, line=True)
        .encode(
            x=alt.X("low_ms:Q", title="latency (ms)", scale=alt.Scale(type="log", nice=False)),
            y=alt.Y("percent:Q", title="requests (%)", stack=None),
            color=alt.Color("run:N", title=None, sort=list(runs), legend=_SQUARES),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("low_ms:Q", title="from (ms)", format=",.2f"),
                alt.Tooltip("high_ms:Q", title="to (ms)", format=",.2f"),
                alt.Tooltip("percent:Q", title="requests (%)", format=".2f"),
            ],
        )
        .properties(height=300)
    )


def over_time(rows: Rows, runs: Sequence[str]) -> Chart:
    """The median and p99 of latency as a measurement went on: a stall is a hill."""
    return (
        of(rows)
        .mark_line(strokeWidth=1.8, point=len(rows) < 100)
        .encode(
            x=alt.X("at_s:Q", title="intended arrival (s since the repeat began)"),
            y=alt.Y("ms:Q", title="latency (ms)", scale=_LOG),
            color=alt.Color("run:N", title=None, sort=list(runs), legend=alt.Legend(orient="top", columns=1)),
            strokeDash=alt.StrokeDash("percentile:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("percentile:N"),
                alt.Tooltip("at_s:Q", title="at (s)", format=",.1f"),
                alt.Tooltip("ms:Q", title="latency (ms)", format=",.2f"),
            ],
        )
        .properties(height=260)
    )

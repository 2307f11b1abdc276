"""Charts of recorded runs: throughput against latency, baselines, stages, ladders, distributions."""

from collections.abc import Sequence

from stageline.dashboard.charts.base import COLUMN, FROM_ZERO, GREY, LOG, TOP, Rows, Spec, category, quantity, values

_BOUND = "#D55E00"
_OURS = {"test": "datum.contender == 'stageline'", "value": "#0072B2"}


def curve(rows: Rows, unit: str, percentile: str, slo_ms: float | None, contenders: Sequence[str]) -> Spec:
    """Latency over throughput; lower right is better. The SLO is a dashed line."""
    names = list(contenders)
    place = {
        "x": quantity("throughput", title=f"throughput ({unit})", scale=FROM_ZERO),
        "y": quantity("latency_ms", title=f"latency {percentile} (ms)", scale=LOG),
        "color": category("contender", title=None, sort=names, legend={"orient": "top", "columns": 3}),
    }
    lines = {
        "transform": [{"filter": "datum.sweep != null"}],
        "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.8},
        "encoding": {**place, "detail": category("sweep"), "order": quantity("order")},
    }
    points = {
        "mark": {"type": "point", "size": 90, "filled": True, "opacity": 1},
        "encoding": {
            **place,
            "shape": category("contender", title=None, sort=names),
            "tooltip": [
                category("contender"),
                category("load"),
                quantity("throughput", title=f"throughput ({unit})", format=",.1f"),
                quantity("latency_ms", title=f"latency {percentile} (ms)", format=",.1f"),
            ],
        },
    }
    layers: list[Spec] = [lines, points]
    if slo_ms is not None:
        bound, at = values([{"slo_ms": slo_ms, "label": f"SLO {slo_ms:g} ms"}]), quantity("slo_ms")
        rule = {"type": "rule", "strokeDash": [6, 4], "color": _BOUND, "strokeWidth": 1.5}
        text = {"type": "text", "align": "left", "dx": 4, "dy": -7, "color": _BOUND, "x": 0}
        layers.append({"data": bound, "mark": rule, "encoding": {"y": at}})
        layers.append({"data": bound, "mark": text, "encoding": {"y": at, "text": category("label")}})
    return {"data": values(rows), "height": 330, "layer": layers}


def baselines(rows: Rows, unit: str) -> Spec:
    """One bar per contender, with its 95 % confidence interval."""
    compared = [f"{row['ratio']:.2f} times as much" if row["ratio"] else "-" for row in rows]
    rows = [{**row, "compared": text} for row, text in zip(rows, compared, strict=True)]
    names = [row["contender"] for row in sorted(rows, key=lambda row: -float(row["throughput"]))]
    y = category("contender", title=None, sort=names, axis={"labelLimit": 180})
    bars = {
        "mark": {"type": "bar", "cornerRadiusEnd": 3},
        "encoding": {
            "x": quantity("throughput", title=f"throughput ({unit})"),
            "y": y,
            "color": {"condition": _OURS, "value": GREY},
            "tooltip": [
                category("contender"),
                category("load"),
                quantity("throughput", title=f"throughput ({unit})", format=",.1f"),
                category("compared", title="stageline does"),
            ],
        },
    }
    reach = {
        "mark": {"type": "rule", "strokeWidth": 2, "color": _BOUND},
        "encoding": {"x": quantity("low"), "x2": {"field": "high"}, "y": y},
    }
    return {"data": values(rows), "height": 80 + 38 * len(rows), "layer": [bars, reach]}


def stages(rows: Rows) -> Spec:
    """How each stage spent its time."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    return {
        "data": values(rows),
        "height": 120 + 40 * len(names),
        "mark": {"type": "bar", "cornerRadius": 2},
        "encoding": {
            "y": category("stage", title=None, sort=names),
            "x": quantity("percent", title="share of the measured time (%)", scale={"domain": [0, 100]}),
            "color": category("what", title=None, sort=["computing", "copying in", "waiting"], legend=TOP),
            "order": quantity("order"),
            "tooltip": [
                category("stage"),
                category("device"),
                quantity("blocks"),
                category("what", title="what"),
                quantity("percent", title="share (%)", format=".1f"),
                quantity("seconds", title="time (s)", format=",.2f"),
            ],
        },
    }


def ladder(rows: Rows, title: str, runs: Sequence[str]) -> Spec:
    """Times by percentile; the axis stretches the slow end."""
    marks = "['p0', 'p90', 'p99', 'p99.9', 'p99.99'][datum.value]"
    return {
        "data": values(rows),
        "height": 300,
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": quantity(
                "nines",
                title="percentile",
                scale={"domain": [0, 4]},
                axis={"values": [0, 1, 2, 3, 4], "labelExpr": marks},
            ),
            "y": quantity("ms", title=title, scale=LOG),
            "color": category("run", title=None, sort=list(runs), legend=COLUMN),
            "strokeDash": category("run", title=None, sort=list(runs)),
            "tooltip": [
                category("run"),
                quantity("percentile", format=".2f"),
                quantity("ms", title=title, format=",.2f"),
            ],
        },
    }


def histogram(rows: Rows, runs: Sequence[str]) -> Spec:
    """Shares of requests by latency, one step line per run."""
    squares = {**COLUMN, "symbolType": "square", "symbolOpacity": 1}
    return {
        "data": values(rows),
        "height": 300,
        "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.28, "line": True},
        "encoding": {
            "x": quantity("low_ms", title="latency (ms)", scale={"type": "log", "nice": False}),
            "y": quantity("percent", title="requests (%)", stack=None),
            "color": category("run", title=None, sort=list(runs), legend=squares),
            "tooltip": [
                category("run"),
                quantity("low_ms", title="from (ms)", format=",.2f"),
                quantity("high_ms", title="to (ms)", format=",.2f"),
                quantity("percent", title="requests (%)", format=".2f"),
            ],
        },
    }


def over_time(rows: Rows, runs: Sequence[str]) -> Spec:
    """Median and p99 latency during a measurement: a stall shows as a hill."""
    return {
        "data": values(rows),
        "height": 260,
        "mark": {"type": "line", "strokeWidth": 1.8, "point": len(rows) < 100},
        "encoding": {
            "x": quantity("at_s", title="intended arrival (s since the repeat began)"),
            "y": quantity("ms", title="latency (ms)", scale=LOG),
            "color": category("run", title=None, sort=list(runs), legend=COLUMN),
            "strokeDash": category("percentile", title=None, legend=TOP),
            "tooltip": [
                category("run"),
                category("percentile"),
                quantity("at_s", title="at (s)", format=",.1f"),
                quantity("ms", title="latency (ms)", format=",.2f"),
            ],
        },
    }

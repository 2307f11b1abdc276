"""Charts of recorded runs: throughput against latency, the Pareto front, baselines, stages, ladders, distributions."""

from collections.abc import Sequence

from stageline.runtime.report import wording
from stageline.runtime.report.spec import (
    COLUMN,
    FROM_ZERO,
    GREY,
    RUNS,
    TOP,
    WORK,
    Rows,
    Spec,
    category,
    colour_of,
    coloured,
    quantity,
    spreading,
    time_unit,
    values,
)

_DASHED = [5, 4]
_CROWDED = 20  # points from which only our closed loops are labelled
_KEYS: Spec = {"orient": "top", "columns": 3}


def curve(rows: Rows, unit: str, time: str, slo_s: float | None, runs: Sequence[str] = ()) -> Spec:
    """A time (named `time`) over throughput; lower right is better. Each point is a load, with 95 % intervals both
    ways up to ±100 %; a line joins the loads of one sweep. Those of the run before are hollow and dashed. The SLO is a
    dashed line.

    Rows: `report.rows.curve_rows`, times in seconds. `runs`: what stands for contenders, if the curves are of runs.
    """
    factor, symbol = time_unit([row["time_s"] for row in rows] + [slo_s or 0.0])
    rows = [{**row, **{name: row[f"{name}_s"] * factor for name in ("time", "low", "high")}} for row in rows]
    colours = dict(zip(runs, RUNS, strict=False)) or colour_of(list(dict.fromkeys(row["contender"] for row in rows)))
    # The axes are made for the points: an interval that nobody knows would shrink them into a corner.
    y = spreading("time", f"{time} ({symbol})", [row["time"] for row in rows] + ([slo_s * factor] if slo_s else []))
    right = 1.2 * max((row["throughput"] for row in rows), default=1.0)
    x = quantity("throughput", title=f"throughput ({unit})", scale={"domain": [0, right], "nice": True})
    colour = coloured("contender", colours, _KEYS)
    tips = [
        category("contender"),
        category("run"),
        category("load"),
        quantity("throughput", title=f"throughput ({unit})", format=",.3~g"),
        quantity("time", title=f"{time} ({symbol})", format=",.3~g"),
        quantity("requests", title="requests", format=","),
    ]
    lines = {
        "transform": [{"filter": "datum.sweep != null"}],
        "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.8},
        "encoding": {
            "x": x, "y": y, "color": colour, "detail": category("sweep"), "order": quantity("order"),
            "strokeDash": category("run", legend=None, scale={"domain": ["this run", "run before"],
                                                              "range": [[1, 0], _DASHED]}),
        },
    }  # fmt: skip
    # One that spans more than twice the value says nothing but that, and would hide the others.
    across = {
        "transform": [{"filter": "datum.most <= 2 * datum.throughput"}],
        "mark": {"type": "rule", "strokeWidth": 1.2, "opacity": 0.7, "clip": True},
        "encoding": {"x": {**x, "field": "least"}, "x2": {"field": "most"}, "y": y, "color": colour},
    }
    upright = {
        "transform": [{"filter": "datum.high <= 2 * datum.time"}],
        "mark": {"type": "rule", "strokeWidth": 1.2, "opacity": 0.7, "clip": True},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
    }
    points = {
        "mark": {"type": "point", "size": 70, "opacity": 1, "strokeWidth": 2},
        "encoding": {
            "x": x, "y": y, "color": colour, "tooltip": tips,
            "shape": category("contender", title=None, scale={"domain": list(colours)}, legend=_KEYS),
            "fillOpacity": {"condition": {"test": "datum.run == 'this run'", "value": 1}, "value": 0},
            "fill": {**colour, "legend": None},
        },
    }  # fmt: skip
    ours = f" && datum.contender == '{next(iter(colours))}' && indexof(datum.short, '/s') < 0"
    crowded = ours if len(rows) > _CROWDED and not runs else ""
    names = {
        "transform": [{"filter": f"datum.run == 'this run'{crowded}"}],
        "mark": {"type": "text", "align": "left", "dx": 7, "dy": -8},
        "encoding": {"x": x, "y": y, "text": category("short")},
    }
    layers: list[Spec] = [lines, across, upright, points, names]
    if slo_s is not None:
        layers += _bound("y", slo_s * factor, f"SLO {slo_s * factor:g} {symbol}", y)
    return {"data": values(rows), "height": 330, "layer": layers}


def _bound(channel: str, at: float, label: str, like: Spec) -> list[Spec]:
    bound, place = values([{"at": at, "label": label}]), {**like, "field": "at"}
    rule = {"type": "rule", "strokeDash": [6, 4], "color": GREY, "strokeWidth": 1.5}
    text = {"type": "text", "align": "left", "dx": 4, "dy": -7, "x": 0}
    return [
        {"data": bound, "mark": rule, "encoding": {channel: place}},
        {"data": bound, "mark": text, "encoding": {channel: place, "text": category("label")}},
    ]


def pareto(rows: Rows) -> Spec:
    """Tokens/s a device over tokens/s a user; upper right is better. A line joins each contender's front: the loads
    that no other load beats in both. With a price, the labels have the cost of a million tokens.

    Rows: `report.rows.pareto_rows`.
    """
    colours = colour_of(list(dict.fromkeys(row["contender"] for row in rows)))
    colour = coloured("contender", colours, _KEYS)
    x = quantity("user", title="tokens/s a user (1 / TPOT p50)", scale=FROM_ZERO)
    y = quantity("device", title="tokens/s a device", scale=FROM_ZERO)
    front = {
        "transform": [{"filter": "datum.front"}],
        "mark": {"type": "line", "strokeWidth": 2, "opacity": 0.8},
        "encoding": {"x": x, "y": y, "color": colour, "order": quantity("user")},
    }
    points = {
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
        "encoding": {
            "x": x, "y": y, "color": colour,
            "shape": category("contender", title=None, scale={"domain": list(colours)}, legend=_KEYS),
            "tooltip": [category("contender"), category("load"), quantity("user", format=",.3~g"),
                        quantity("device", format=",.3~g"), category("cost")],
        },
    }  # fmt: skip
    names = {
        "mark": {"type": "text", "align": "left", "dx": 7, "dy": -8},
        "encoding": {"x": x, "y": y, "text": category("label")},
    }
    return {"data": values(rows), "height": 260, "layer": [front, points, names]}


def baselines(rows: Rows, figure: str) -> Spec:
    """One bar per contender under one load, with its 95 % confidence interval. Rows: `report.rows.baseline_rows`;
    `figure` names what they have, in seconds if it is a time."""
    title = wording.label(figure)
    if figure.endswith("_s") and not figure.endswith("_per_s"):
        factor, symbol = time_unit(row["high"] for row in rows)
        rows = [{**row, **{name: row[name] * factor for name in ("value", "low", "high")}} for row in rows]
        title = f"{title} ({symbol})"
    colours = colour_of([row["contender"] for row in rows])
    y = category("contender", title=None, sort=list(colours), axis={"labelLimit": 180})
    bars = {
        "mark": {"type": "bar", "cornerRadiusEnd": 3, "height": 20},
        "encoding": {
            "x": quantity("value", title=title),
            "y": y,
            "color": coloured("contender", colours, None),
            "tooltip": [
                category("contender"),
                category("load"),
                category("shown", title=wording.label(figure)),
                category("compared", title="stageline has"),
            ],
        },
    }
    reach = {
        "mark": {"type": "rule", "strokeWidth": 2, "color": GREY},
        "encoding": {"x": quantity("low"), "x2": {"field": "high"}, "y": y},
    }
    return {"data": values(rows), "height": 34 * len(rows), "layer": [bars, reach]}


def stages(rows: Rows) -> Spec:
    """How each stage spent its time. Rows: `report.rows.stage_rows`."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    return {
        "data": values(rows),
        "height": 34 * len(names),
        "mark": {"type": "bar", "cornerRadius": 2, "height": 20},
        "encoding": {
            "y": category("stage", title=None, sort=names),
            "x": quantity("percent", title="share of the measured time (%)", scale={"domain": [0, 100]}),
            "color": coloured("what", WORK),
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


def ladder(rows: Rows, time: str, runs: Sequence[str]) -> Spec:
    """A time by percentile; the axis stretches the slow end. Rows: `report.rows.ladder_rows`, times in seconds."""
    factor, symbol = time_unit(row["seconds"] for row in rows)
    rows = [{**row, "time": row["seconds"] * factor} for row in rows]
    title = f"{time} ({symbol})"
    marks = "['p0', 'p90', 'p99', 'p99.9', 'p99.99'][datum.value]"
    return {
        "data": values(rows),
        "height": 260,
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": quantity(
                "nines",
                title="percentile",
                scale={"domain": [0, 4]},
                axis={"values": [0, 1, 2, 3, 4], "labelExpr": marks},
            ),
            "y": spreading("time", title, (row["time"] for row in rows)),
            "color": _of_runs(runs),
            "strokeDash": category("run", title=None, sort=list(runs), legend=None),
            "tooltip": [
                category("run"),
                quantity("percentile", format=".2f"),
                quantity("time", title=title, format=",.3~g"),
            ],
        },
    }


def _of_runs(runs: Sequence[str]) -> Spec:
    return coloured("run", dict(zip(runs, RUNS, strict=False)), COLUMN)


def histogram(rows: Rows, runs: Sequence[str]) -> Spec:
    """Shares of requests by latency, one step line per run."""
    factor, symbol = time_unit(row["high_s"] for row in rows)
    rows = [{**row, "low": row["low_s"] * factor, "high": row["high_s"] * factor} for row in rows]
    squares = {**COLUMN, "symbolType": "square", "symbolOpacity": 1}
    return {
        "data": values(rows),
        "height": 220,
        "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.28, "line": True},
        "encoding": {
            "x": spreading("low", f"latency ({symbol})", (row["low"] for row in rows)),
            "y": quantity("percent", title="requests (%)", stack=None),
            "color": {**_of_runs(runs), "legend": squares},
            "tooltip": [
                category("run"),
                quantity("low", title=f"from ({symbol})", format=",.3~g"),
                quantity("high", title=f"to ({symbol})", format=",.3~g"),
                quantity("percent", title="requests (%)", format=".2f"),
            ],
        },
    }


def over_time(rows: Rows, runs: Sequence[str]) -> Spec:
    """Latency during a measurement, its median a line and its p99 dashed: a stall shows as a hill."""
    factor, symbol = time_unit(row["seconds"] for row in rows)
    rows = [{**row, "time": row["seconds"] * factor} for row in rows]
    dashes = {"domain": ["p50", "p99"], "range": [[1, 0], _DASHED]}
    stroke = {**TOP, "symbolType": "stroke", "symbolSize": 400, "symbolStrokeColor": GREY, "symbolStrokeWidth": 2}
    return {
        "data": values(rows),
        "height": 220,
        "mark": {"type": "line", "strokeWidth": 1.8, "point": len(rows) < 100},
        "encoding": {
            "x": quantity("at_s", title="intended arrival (s since the repeat began)"),
            "y": spreading("time", f"latency ({symbol})", (row["time"] for row in rows)),
            "color": _of_runs(runs),
            "strokeDash": category("percentile", title=None, scale=dashes, legend=stroke),
            "tooltip": [
                category("run"),
                category("percentile"),
                quantity("at_s", title="at (s)", format=",.1f"),
                quantity("time", title=f"latency ({symbol})", format=",.3~g"),
            ],
        },
    }  # fmt: skip

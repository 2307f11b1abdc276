"""The chart of the Live page: panels one below the other on one clock, with one crosshair through all of them."""

from collections.abc import Sequence

from stageline.dashboard.charts.base import Rows, Spec, category, quantity, values
from stageline.dashboard.figures.live import Panel

_HEIGHT = 110


def panels(rows: Rows, found: Sequence[Panel]) -> Spec:
    """One panel each, of its own height; `rows` have at (ms since the epoch), panel, line and value. The spec stays the
    same while a service runs, so that only the data moves."""
    names = [f"panel {number}" for number, _ in enumerate(found)]
    hover = {
        "name": "crosshair",
        "select": {"type": "point", "on": "pointermove", "encodings": ["x"], "nearest": True, "clear": "pointerout"},
        "views": names,
    }
    return {
        "data": values(rows),
        "params": [hover],
        "spacing": 14,
        "vconcat": [_panel(panel, name) for panel, name in zip(found, names, strict=True)],
        "resolve": {"scale": {"color": "independent", "strokeDash": "independent", "x": "shared"}},
    }


def _panel(panel: Panel, name: str) -> Spec:
    lines = list(panel.lines)
    # Labels lie inside the plot: a chart of several panels is as wide as its plots, axes come on top.
    inside = {"title": None, "labelAlign": "left", "labelBaseline": "bottom", "labelPadding": -4, "labelOffset": -2}
    y_axis = {**inside, "ticks": False, "domain": False, "tickCount": 4, "zindex": 1, "labelFontSize": 12}
    clock = {"format": "%H:%M:%S", "labelFlush": True, "grid": False, "tickCount": 6}
    x: Spec = {"field": "at", "type": "temporal", "title": None, "scale": {"nice": False}, "axis": clock}
    scale: Spec = {"domainMin": 0, "nice": True} if panel.top is None else {"domain": [0, panel.top]}
    legend = {"orient": "top", "offset": 14, "padding": 0, "symbolType": "stroke", "symbolSize": 160}
    named = category("line", title=None, sort=lines, scale={"domain": lines}, legend=legend if len(lines) > 1 else None)
    own = [{"filter": {"field": "panel", "equal": panel.title}}]
    drawn: Spec = {
        "transform": own,
        "mark": {"type": "line", "strokeWidth": 2, "interpolate": "linear", "clip": True},
        "encoding": {
            "x": x,
            "y": quantity("value", title=None, scale=scale, axis=y_axis),
            "color": named,
            "strokeDash": named,
            "opacity": {"condition": {"test": "datum.line === null", "value": 0}, "value": 1},
        },
    }
    shown = [quantity(one.replace(".", "\\."), title=f"{one} ({panel.unit})", format=",.4~g") for one in lines]
    crosshair: Spec = {
        "name": name,
        "transform": [*own, {"pivot": "line", "value": "value", "groupby": ["at"]}],
        "mark": {"type": "rule", "strokeWidth": 1, "color": "#8A8F98"},
        "encoding": {
            "x": x,
            "opacity": {"condition": {"param": "crosshair", "empty": False, "value": 1}, "value": 0},
            "tooltip": [{"field": "at", "type": "temporal", "title": "at", "format": "%H:%M:%S"}, *shown],
        },
    }
    title = {"text": f"{panel.title} ({panel.unit})", "anchor": "start", "fontSize": 14, "offset": 4}
    return {"title": title, "height": _HEIGHT, "layer": [drawn, crosshair]}

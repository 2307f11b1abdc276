"""Charts of the Timeline page: a Gantt chart of the stages with their bubbles, and utilisation over the whole."""

from collections.abc import Sequence

from stageline.dashboard.charts.base import AUTOSIZE, GREY, TOP, Rows, Spec, category, quantity, values

KINDS = ("batch", "prefill", "decode", "mixed", "copy")
WINDOW = "window"
"""The selection of a part of the time axis."""
_SELECTION: Spec = {
    "name": WINDOW,
    "select": {"type": "interval", "encodings": ["x"], "translate": False, "zoom": False},
}


def gantt(spans: Rows, bubbles: Rows, stages: Sequence[str], window_ms: tuple[float, float]) -> Spec:
    """One lane per stage; dragging over it selects a window, `window`, of the time axis."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in spans)]
    place = {
        "x": quantity(
            "begin_ms",
            title="time since the measurement began (ms)",
            scale={"domain": list(window_ms), "nice": False, "zero": False},
            axis={"format": ",~r"},
        ),
        "x2": {"field": "end_ms"},
        "y": category("stage", title=None, sort=list(stages), scale={"domain": list(stages), "paddingInner": 0.25}),
    }
    times = [
        quantity("ms", title="took (ms)", format=",.3f"),
        quantity("begin_ms", title="began at (ms)", format=",.3f"),
    ]
    idle = {
        "data": values(bubbles),
        "mark": {
            "type": "rect", "fill": GREY, "fillOpacity": 0.18, "stroke": GREY, "strokeDash": [3, 2], "strokeWidth": 1,
            "clip": True,
        },
        "encoding": {**place, "tooltip": [category("stage"), category("kind", title="waits"), *times]},
    }  # fmt: skip
    work = {
        "data": values(spans),
        "params": [_SELECTION],
        "mark": {"type": "rect", "cornerRadius": 2, "clip": True, "stroke": "white", "strokeWidth": 0.4},
        "encoding": {
            **place,
            "color": category(
                "kind", title=None, scale={"domain": kinds}, legend={"orient": "top", "symbolStrokeWidth": 0}
            ),
            "tooltip": [
                category("stage"),
                category("kind", title="what"),
                category("shape", title="micro-batch"),
                quantity("micro_batch", title="number"),
                category("requests"),
                *times,
            ],
        },
    }
    return {"height": 40 + 52 * len(stages), "autosize": AUTOSIZE, "layer": [idle, work]}


def utilisation(rows: Rows, window_s: tuple[float, float]) -> Spec:
    """Utilisation of each stage over the whole recording; the band is the window of the Gantt chart."""
    band = {
        "data": values([{"low": window_s[0], "high": window_s[1]}]),
        "mark": {"type": "rect", "fill": GREY, "fillOpacity": 0.25},
        "encoding": {"x": quantity("low"), "x2": {"field": "high"}},
    }
    lines = {
        "data": values(rows),
        "params": [_SELECTION],
        "mark": {"type": "line", "strokeWidth": 1.5, "interpolate": "step"},
        "encoding": {
            "x": quantity("at_s", title="time since the measurement began (s)", scale={"nice": False, "zero": False}),
            "y": quantity("percent", title="utilisation (%)", scale={"domain": [0, 100]}),
            "color": category("stage", title=None, legend=TOP),
            "tooltip": [
                category("stage"),
                quantity("at_s", title="at (s)", format=",.2f"),
                quantity("percent", title="utilisation (%)", format=".0f"),
            ],
        },
    }
    return {"height": 120, "autosize": AUTOSIZE, "layer": [band, lines]}

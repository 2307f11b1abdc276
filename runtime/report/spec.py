"""Parts of Vega-Lite specs that all charts share. A spec is plain data: building and validating the objects of a chart
library took longer than everything else a page computed. `tests/dashboard/test_charts.py` validates the specs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Rows: TypeAlias = Sequence[dict[str, Any]]
Spec: TypeAlias = dict[str, Any]
GREY = "#8A8F98"
"""For waiting, bounds, and the window of another chart. Readable on light and on dark ground."""
CONTENDERS = {"stageline": "#0072B2", "onnxruntime": "#D55E00", "openvino": "#00875F", "torch": "#B5477A",
              "torch-compile": "#9A6A00"}  # fmt: skip
"""The colour of a contender on every page: after Okabe and Ito, each at least 3:1 on white and on the dark ground."""
OTHERS = ("#7A6F45", "#5F7A8A", "#8A5F5F")
"""Of contenders that are not listed, such as URLs, in the order of their appearance."""
RUNS = ("#0072B2", "#D55E00", "#00875F", "#B5477A", "#9A6A00", "#5F7A8A")
"""Of runs side by side, in their order."""
WORK = {"computing": "#7B68B5", "copying in": "#A6761D", "waiting": GREY}
"""Of what a stage does: none of the contenders' colours; waiting is grey everywhere."""
INK = {"light": "#1b2530", "dark": "#e8ecf1"}
"""Of words in a chart."""
AUTOSIZE: Spec = {"type": "fit-x", "contains": "padding"}
"""A spec's height is that of its plot: legends and titles lie outside of it. (`fit` would take them from the plot.)"""
TOP: Spec = {"orient": "top"}
COLUMN: Spec = {"orient": "top", "columns": 1}
"""Legends."""
LOG: Spec = {"type": "log", "nice": False, "padding": 12}
FROM_ZERO: Spec = {"zero": True}
"""Scales."""
_STEPS = (1.0, 2.0, 5.0)
_LOG_FROM = 5.0  # the largest value over the smallest from which an axis is logarithmic


def quantity(field: str, **more: Any) -> Spec:
    """A channel of numbers."""
    return {"field": field, "type": "quantitative", **more}


def category(field: str, **more: Any) -> Spec:
    """A channel of names."""
    return {"field": field, "type": "nominal", **more}


def values(rows: Rows) -> Spec:
    """Rows as the data of a chart or of a layer."""
    return {"values": list(rows)}


def spreading(field: str, title: str, numbers: Iterable[float], **more: Any) -> Spec:
    """A channel of positive numbers: from zero, or, if they spread over several times, logarithmic with ticks at 1, 2
    and 5, and the title says so."""
    known = [number for number in numbers if number > 0 and math.isfinite(number)]
    if not known or max(known) < _LOG_FROM * min(known):
        return quantity(field, title=title, scale=FROM_ZERO, **more)
    low, high = min(known), max(known)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in _STEPS]
    below = max((tick for tick in ticks if tick <= low), default=low)
    above = min((tick for tick in ticks if tick >= high), default=high)
    shown = [tick for tick in ticks if below <= tick <= above]
    scale = {"type": "log", "domain": [below, above], "nice": False}
    return quantity(field, title=f"{title}, log scale", scale=scale, axis={"values": shown}, **more)


def time_unit(seconds: Iterable[float]) -> tuple[float, str]:
    """The one unit of a chart's times: what seconds are multiplied by, and its name; seconds from 1,000 ms on."""
    return (1.0, "s") if max(seconds, default=0.0) >= 1.0 else (1e3, "ms")


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each contender, always the same for one that is known."""
    others = iter(OTHERS * len(names))
    return {name: CONTENDERS.get(name) or next(others) for name in names}


def coloured(field: str, colours: dict[str, str], legend: Spec | None = TOP) -> Spec:
    """A channel of names with these colours; `legend` None: no legend."""
    scale = {"domain": list(colours), "range": list(colours.values())}
    return category(field, title=None, scale=scale, legend=legend)


def dressed(spec: Spec, theme: str = "light", sentence: str = "") -> Spec:
    """The spec with words in the ink of a theme, at least 12 px and 4.5:1, its plot's height kept, and a sentence for
    who cannot see it."""
    ink = INK.get(theme, INK["light"])
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    config = {"axis": words, "legend": words, "text": {"color": ink, "fontSize": 12}}
    return {**spec, "autosize": AUTOSIZE, "config": config, "description": sentence}

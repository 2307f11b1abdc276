"""Charts of the Engines page."""

from stageline.dashboard.charts.base import AUTOSIZE, TOP, Rows, Spec, category, quantity, values
from stageline.runtime.report.spec import coloured, time_unit


def families(rows: Rows, colours: dict[str, str]) -> Spec:
    """What layers do, a bar for each engine; `rows` have engine, family, seconds and share."""
    factor, unit = time_unit(row["seconds"] for row in rows)
    drawn = [{**row, "time": row["seconds"] * factor} for row in rows]
    order = list(dict.fromkeys(row["family"] for row in rows))
    names = list(colours)
    return {
        "data": values(drawn),
        "height": {"step": 18},
        "autosize": AUTOSIZE,
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "y": category("family", title=None, sort=order, axis={"labelLimit": 200}),
            "yOffset": category("engine", sort=names),
            "x": quantity("time", title=f"time of a micro-batch ({unit})"),
            "color": coloured("engine", colours, TOP),
            "tooltip": [
                category("engine"),
                category("family", title="what layers do"),
                quantity("time", title=f"time ({unit})", format=".3~g"),
                quantity("share", title="of this engine's layers", format=".1%"),
            ],
        },
    }

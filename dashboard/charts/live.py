"""Charts of the Live page: lines over the last minutes."""

from stageline.dashboard.charts.base import TOP, Rows, Spec, category, quantity, values
from stageline.dashboard.figures.live import KEPT_S


def lines(rows: Rows, title: str, names: list[str], top: float | None = None, form: str = ",.1f") -> Spec:
    """One line per name; `rows` have ago_s, value and line. The spec stays the same, so that only the data moves."""
    name = category("line", title=None, sort=names, scale={"domain": names}, legend=TOP if len(names) > 1 else None)
    return {
        "data": values(rows),
        "height": 220,
        "mark": {"type": "line", "strokeWidth": 2, "interpolate": "monotone", "clip": True},
        "encoding": {
            "x": quantity("ago_s", title="time (s, 0 is now)", scale={"domain": [-KEPT_S, 0], "nice": False}),
            "y": quantity(
                "value", title=title, scale={"domainMin": 0} if top is None else {"domainMin": 0, "domainMax": top}
            ),
            "color": name,
            "strokeDash": name,
            "tooltip": [
                category("line", title=" "),
                quantity("value", title=title, format=form),
                quantity("ago_s", title="s ago"),
            ],
        },
    }

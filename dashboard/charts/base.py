"""Parts of Vega-Lite specs that all charts share. A spec is plain data: building and validating the objects of a chart
library took longer than everything else a page computed. `tests/dashboard/test_charts.py` validates the specs."""

from collections.abc import Sequence
from typing import Any, TypeAlias

Rows: TypeAlias = Sequence[dict[str, Any]]
Spec: TypeAlias = dict[str, Any]
GREY = "#8A8F98"
"""For waiting, bounds, and the window of another chart. Readable on light and on dark ground."""
TOP: Spec = {"orient": "top"}
COLUMN: Spec = {"orient": "top", "columns": 1}
"""Legends."""
LOG: Spec = {"type": "log", "nice": False, "padding": 12}
FROM_ZERO: Spec = {"zero": True}
"""Scales."""


def quantity(field: str, **more: Any) -> Spec:
    """A channel of numbers."""
    return {"field": field, "type": "quantitative", **more}


def category(field: str, **more: Any) -> Spec:
    """A channel of names."""
    return {"field": field, "type": "nominal", **more}


def values(rows: Rows) -> Spec:
    """Rows as the data of a chart or of a layer."""
    return {"values": list(rows)}

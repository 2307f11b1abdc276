"""What all charts share: rows as data, and Altair's border with typed code."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import altair as alt

Rows: TypeAlias = Sequence[dict[str, Any]]
Chart: TypeAlias = Any
"""An Altair chart, of one or several layers; Altair's own methods are not typed."""
GREY = "#8A8F98"
"""Of what is not there: waiting, bounds, the window of another chart. Readable on light and on dark ground."""


def of(rows: Rows) -> Chart:
    """A chart of these rows, to be given marks."""
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]

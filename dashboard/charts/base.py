"""The parts of specs that the dashboard's own charts share with those of reports."""

from stageline.runtime.report.spec import (
    AUTOSIZE,
    FROM_ZERO,
    GREY,
    LOG,
    TOP,
    Rows,
    Spec,
    category,
    quantity,
    values,
)

__all__ = ["AUTOSIZE", "FROM_ZERO", "GREY", "LOG", "TOP", "Rows", "Spec", "category", "quantity", "values"]

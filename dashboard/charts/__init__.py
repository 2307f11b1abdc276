"""Charts: rows in, Vega-Lite specs out, one file per page. Colours come from the theme; every axis has its unit."""

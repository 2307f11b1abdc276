"""Charts: rows in, Vega-Lite specs out; a file for each family. Colours come from the theme, units stand on every axis."""

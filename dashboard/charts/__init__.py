"""Charts: rows in, Vega-Lite specs out; a file for each family. Colours are the theme's, units stand on every axis."""

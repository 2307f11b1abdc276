"""Processes that the dashboard starts: benchmarks and services."""

"""Devices: where a stage runs and who moves its data."""

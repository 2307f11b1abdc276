"""Quantising a checkpoint's weights while they are exported."""

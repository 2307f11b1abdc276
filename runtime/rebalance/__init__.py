"""Rebalancing: the running pipeline measures its stages, finds a better cut, and switches to it."""

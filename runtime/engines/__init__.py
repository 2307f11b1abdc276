"""Engines: what runs one stage on a device."""

"""Generating text: requests, scheduling over cache slots, sampling, and turning tokens back into text."""

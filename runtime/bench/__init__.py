"""Benchmarks with history: loads, what they measured, and the store that keeps it."""

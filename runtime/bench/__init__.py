"""Benchmarks with history: loads, measurements, and the store that keeps them."""

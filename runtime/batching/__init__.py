"""Batches through the stages: split into micro-batches, run, joined."""

"""Comparing a bundle or its engines with the checkpoint that it was made from."""

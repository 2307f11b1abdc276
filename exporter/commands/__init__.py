"""The `stageline` command: one module per command."""

"""Graph passes that turn a stage into what one engine runs: one pass per module."""

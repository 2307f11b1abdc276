"""The wire between a pipeline and stages in other processes and on other machines: frames, keys, messages."""

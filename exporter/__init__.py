"""From a checkpoint to a bundle: trace, cut, write, verify; and the `stageline` command."""

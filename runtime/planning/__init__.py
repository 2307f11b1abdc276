"""Planning: what a cut costs, where to cut, how fast the result will be, and why."""

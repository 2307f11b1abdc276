"""Planning: what a cut costs, where to cut, what it will give, and why."""

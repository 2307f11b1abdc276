"""What the pages show, computed from stored runs, plans and metrics."""

"""Names of the caches in a stage's graph."""


def past_names(cache: str) -> tuple[str, str]:
    """The graph inputs that hold a cache's keys and values [rows, heads, capacity, padded size]."""
    return f"{cache}.key", f"{cache}.value"


def present_names(cache: str) -> tuple[str, str]:
    """The graph outputs that are the same buffers after the step."""
    return f"{cache}.key.present", f"{cache}.value.present"

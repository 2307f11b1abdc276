"""Where Stageline keeps what it can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`stageline` in the user's cache folder (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stageline"

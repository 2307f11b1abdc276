"""Profiles whose times need not be good: each is taken once, however much others disturb it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stageline.runtime.planning import measure as measuring


@contextmanager
def hasty_profiles() -> Iterator[None]:
    """Measure so meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_TRIES", 1)
        patch.setattr(measuring, "_POINT_S", 0.01)
        yield

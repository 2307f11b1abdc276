"""The dashboard's options: the store, and where to look for bundles."""

import functools
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stageline.runtime.bundle.folder import MANIFEST


@dataclass(frozen=True)
class DashboardSettings:
    """`store` None: the user's default store. `bundles`: bundles, or folders of bundles."""

    store: Path | None
    bundles: tuple[Path, ...]

    @classmethod
    def given(cls) -> "DashboardSettings":
        """The settings in this process's command line, which `__main__` passes on."""
        return _parsed(tuple(sys.argv[1:]), Path.cwd())


@functools.lru_cache(maxsize=1)
def _parsed(arguments: tuple[str, ...], here: Path) -> DashboardSettings:
    parser = ArgumentParser()
    parser.add_argument("--store", type=Path)
    parser.add_argument("--bundles", type=Path, action="append")
    known, _ = parser.parse_known_args(arguments)
    return DashboardSettings(known.store, tuple(known.bundles or [here / "bundles", here]))


def as_typed(path: Path | str) -> str:
    """A path as a user would type it: relative to the working folder if it lies inside."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def find_bundles(places: Iterable[Path]) -> list[Path]:
    """The bundles among `places` and directly inside them, each once, sorted by name."""
    found: dict[Path, None] = {}
    for place in places:
        try:
            inside = sorted(place.iterdir()) if place.is_dir() else []
        except OSError:
            inside = []
        for folder in (place, *inside):
            if (folder / MANIFEST).is_file():
                found.setdefault(folder.resolve())
    return sorted(found, key=lambda folder: (folder.name, str(folder)))

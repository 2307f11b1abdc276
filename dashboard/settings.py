"""The dashboard's options: the store, where to look for bundles, and what its visitors may do."""

import functools
import importlib.util
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stageline.dashboard.addresses import allowed_address
from stageline.runtime.bundle.folder import MANIFEST
from stageline.runtime.engines import ON_GPUS


@dataclass(frozen=True)
class DashboardSettings:
    """`store` None: the user's default store. `bundles`: bundles, or folders of bundles. `services`: addresses on other
    machines that the pages may read and send requests to. `read_only`: pages start and stop nothing."""

    store: Path | None
    bundles: tuple[Path, ...]
    services: tuple[str, ...] = ()
    read_only: bool = False

    @classmethod
    def given(cls) -> "DashboardSettings":
        """The settings in this process's command line, which `__main__` passes on."""
        return _parsed(tuple(sys.argv[1:]), Path.cwd())


def add_options(parser: ArgumentParser) -> None:
    """The options of the command line that are settings; `__main__` has further ones."""
    parser.add_argument("--store", type=Path)
    parser.add_argument("--bundles", type=Path, action="append", default=[])
    parser.add_argument("--service", type=allowed_address, action="append", default=[])
    parser.add_argument("--read-only", action="store_true")


@functools.lru_cache(maxsize=1)
def _parsed(arguments: tuple[str, ...], here: Path) -> DashboardSettings:
    parser = ArgumentParser()
    add_options(parser)
    known, _ = parser.parse_known_args(arguments)
    return DashboardSettings(
        known.store, tuple(known.bundles or default_places(here)), tuple(known.service), known.read_only
    )


def default_places(here: Path) -> list[Path]:
    """Where bundles are looked for if nothing is said."""
    return [here / "bundles", here]


def usable_engines() -> list[str]:
    """The engines that are installed; those on GPUs where there is an NVIDIA driver."""
    gpus = sorted(ON_GPUS) if Path("/proc/driver/nvidia/version").exists() else []
    return [*(name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)), *gpus]


def as_typed(path: Path | str) -> str:
    """A path as a user would type it: relative to the working folder if it lies inside."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def example_bundle(places: Iterable[Path]) -> str:
    """A bundle for commands that a page suggests: the first that there is, as one would type it."""
    return as_typed(next(iter(find_bundles(places)), Path("bundles/minilm")))


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

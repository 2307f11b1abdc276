"""Names of the Hugging Face Hub where commands take paths. A path that exists is taken as one."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from stageline.exporter.commands import common
from stageline.models.errors import CheckpointError
from stageline.models.hub import Fetched, fetch
from stageline.models.hub_name import HubName
from stageline.models.user_cache import user_cache
from stageline.runtime.bundle.manifest import UncutManifest

CHECKPOINT_HELP = "A Hugging Face folder, a .safetensors or .gguf file, or ORG/NAME[@REVISION][:FILE] on the Hub."
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, or ORG/NAME[@REVISION][:FILE] on the Hub.")
]
_COMMIT_DIGITS = 12


def hub_name(given: Path) -> HubName | None:
    """The name of the Hub that is meant; None if it is a path. CheckpointError for an address, with its name."""
    if given.exists():
        return None
    if (meant := HubName.of_address(str(given))) is not None:
        raise CheckpointError(f"{given} is an address; give the name of what is there: {meant}")
    return HubName.parse(str(given))


def checkpoint_of(given: Path) -> Path:
    """The checkpoint at a path, or of a name of the Hub, which is downloaded into the Hub's cache."""
    name = hub_name(given)
    if name is None:
        return given
    found = fetched(name)
    if found.is_bundle:
        raise CheckpointError(f"{name} holds a bundle, which is exported already; run it: stageline run {name}")
    return found.path


def bundle_of(given: Path) -> Path:
    """The bundle at a path, or of a name of the Hub. A checkpoint there is exported once, into the user's cache."""
    name = hub_name(given)
    if name is None:
        return given
    found = fetched(name)
    return found.path if found.is_bundle else _exported(name, found)


def fetched(name: HubName) -> Fetched:
    """What has this name on the Hub, downloaded into the Hub's cache."""
    if not sys.stderr.isatty():
        with suppress(ImportError):  # `fetch` says what to install
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
    return fetch(name, lambda step: print(f"stageline: {step}", file=sys.stderr))


def _exported(name: HubName, found: Fetched) -> Path:
    """The bundle of a downloaded checkpoint, by its commit and our version, exported if there is none."""
    made_by = f"stageline-{version('stageline')}-{UncutManifest.model_fields['version'].default}"
    called = Path(name.file).stem if name.file else name.repository.partition("/")[2]
    family = user_cache() / "bundles" / name.repository.replace("/", "--")
    target = family / f"{called}-{found.commit[:_COMMIT_DIGITS]}-{made_by}"
    with _one_at_a_time(family):
        if not target.exists():
            with common.needs(*common.EXPORTER):
                from stageline.exporter.export import export
            with common.progress_steps() as progress:
                export(found.path, target, progress=progress)
            print(f"stageline: exported {name} to {target}", file=sys.stderr)
    return target


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let no two processes export the same repository; the second one then finds the bundle of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

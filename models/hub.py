"""Downloading a checkpoint or a bundle from the Hugging Face Hub, by huggingface_hub and into its cache.

Only what is needed comes: small files, and the weights in .safetensors or .gguf; never a pickle, never code. Tokens,
offline mode, the cache's place and the Hub's address are huggingface_hub's own settings.
"""

import glob
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageline.models.checkpoint import shards_of
from stageline.models.errors import CheckpointError
from stageline.models.hub_name import HubName
from stageline.models.weight_files import complete, weight_files

_MANIFEST = "manifest.json"  # of a bundle
_BUNDLE = re.compile(r"manifest\.json|[^/]+\.onnx|(parts|weights|tokenizer)/.+")
"""A bundle's files, without `engines/`: engine files are code, and made for the GPUs of whoever built them."""
_SMALL = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken|spm|bpe|codes|vocab)|\d+_\w+/[^/]+\.(json|txt|safetensors)")
"""What stands beside the weights; the folders are the modules of sentence-transformers."""
_WEIGHTS = (".safetensors", ".gguf")
_NAMED = 8  # files named in a message


@dataclass(frozen=True)
class Fetched:
    """What was downloaded. `path` is what `Checkpoint.open` or `Bundle.open` takes, in the Hub's cache."""

    path: Path
    commit: str
    is_bundle: bool


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at a commit, with their sizes in bytes; `offline` if only the cache knows them."""

    commit: str
    sizes: Mapping[str, int]
    offline: bool


def fetch(name: HubName, progress: Callable[[str], None] = lambda step: None) -> Fetched:
    """Make the checkpoint or the bundle of this name be in the Hub's cache, downloading what is not.

    If the Hub cannot be reached, what the cache has is used. `progress` is told what is being downloaded.

    Raises:
        CheckpointError: huggingface_hub is not installed, the Hub has no such thing or does not give it, or it is not a
            checkpoint that can be read.
    """
    repository = _Repository(name, progress)
    listing = repository.list()
    names = listing.sizes.keys()
    if _is_bundle(names):
        return Fetched(repository.download(listing, list(filter(_BUNDLE.fullmatch, names))), listing.commit, True)
    if name.file is not None:
        _check_file(name, names)
    folder = repository.download(listing, list(filter(_SMALL.fullmatch, names)))
    weights = _weights(name, names, folder)
    repository.download(listing, weights)
    one_file = name.file is not None or weights[0].endswith(".gguf")
    return Fetched(folder / weights[0] if one_file else folder, listing.commit, False)


def _is_bundle(names: Collection[str]) -> bool:
    return _MANIFEST in names and any(name.startswith("parts/") for name in names)


def _check_file(name: HubName, names: Collection[str]) -> None:
    file = str(name.file)
    if file not in names or not file.endswith(_WEIGHTS):
        there = [n for n in sorted(names) if n.endswith(_WEIGHTS)]
        raise CheckpointError(f"{name.repository} has no weights in {file!r}; it has {_some(there) or 'none at all'}")


def _weights(name: HubName, names: Collection[str], folder: Path) -> list[str]:
    """The files of weights to download; `folder` has the small files. The first one names the checkpoint of a .gguf."""
    if name.file is not None:
        return list(complete(name.file, names, name).files)
    found = weight_files([n for n in names if "/" not in n], name)
    if found is not None:
        files = set(found.files if found.index is None else shards_of(folder / found.index).values())
        lost = sorted(files - set(names))
        if lost:
            raise CheckpointError(f"{name} lacks {lost[0]!r}, which its {found.index} names; ask its authors")
        return sorted(files)
    ggufs = [n for n in sorted(names) if n.endswith(".gguf") and not Path(n).name.startswith("mmproj")]
    sets = {complete(n, ggufs, name).files for n in ggufs}
    if len(sets) == 1:
        return list(sets.pop())
    if sets:
        firsts = sorted(files[0] for files in sets)
        raise CheckpointError(f"{name} has {len(sets)} .gguf models: {_some(firsts)}; choose one: {name}:{firsts[0]}")
    others = [
        n for n in sorted(names) if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx"))
    ]
    raise CheckpointError(
        f"{name} has no weights in .safetensors or .gguf files"
        + (f" (it has {_some(others)}); convert it where you trust it, or look for a pull request that adds them and "
           f"give its number: {name.repository}@refs/pr/NUMBER" if others else "")
    )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


class _Repository:
    """A repository of the Hub, by huggingface_hub. Every failure becomes a CheckpointError in one line."""

    def __init__(self, name: HubName, progress: Callable[[str], None]) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors
        except ImportError as error:
            raise CheckpointError(
                f"there is no {name} here; if that is a name on the Hugging Face Hub: pip install 'stageline[hub]'"
            ) from error
        self._hub: Any = huggingface_hub
        self._errors: Any = errors
        self._endpoint, self._cache = constants.ENDPOINT, constants.HF_HUB_CACHE
        self._timeout_s = constants.HF_HUB_ETAG_TIMEOUT  # without one, a network that drops packets is waited for
        self._name, self._progress = name, progress

    def list(self) -> _Listing:
        """The files at the revision, as the Hub says or, if it does not answer, as far as the cache has them."""
        name = self._name
        try:
            info = self._hub.HfApi().model_info(
                name.repository, revision=name.revision, timeout=self._timeout_s, files_metadata=True
            )
            return _Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings}, offline=False)
        except self._errors.RevisionNotFoundError as error:
            raise self._failed(error) from error
        except Exception as error:  # the exceptions of its HTTP client have no common base
            folder = self._cached()
            if folder is None:
                raise self._failed(error) from error
            if not isinstance(error, self._errors.OfflineModeIsEnabled):
                self._progress(f"the Hub does not give {name}, so the cached one is used ({_first_line(error)})")
            files = [file for file in folder.rglob("*") if file.is_file()]
            sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
            return _Listing(folder.name, sizes, offline=True)

    def download(self, listing: _Listing, files: Collection[str]) -> Path:
        """The snapshot's folder, with these files in it."""
        name = self._name
        lacking = [
            listing.sizes[file]
            for file in files
            if not isinstance(self._hub.try_to_load_from_cache(name.repository, file, revision=listing.commit), str)
        ]
        if lacking:
            count = "1 file" if len(lacking) == 1 else f"{len(lacking)} files"
            self._progress(f"downloading {count} of {name}, {sum(lacking) / 1e6:,.1f} MB")
        try:
            folder = Path(
                self._hub.snapshot_download(
                    name.repository,
                    revision=listing.commit if listing.offline else name.revision,
                    allow_patterns=[glob.escape(file) for file in files],
                    local_files_only=listing.offline,
                )
            )
        except Exception as error:  # as above
            raise self._failed(error) from error
        if folder.name != listing.commit:
            raise CheckpointError(f"{name} was changed while it was downloaded; try again")
        return folder

    def _cached(self) -> Path | None:
        """The snapshot in the cache, which may lack files."""
        try:
            return Path(
                self._hub.snapshot_download(
                    self._name.repository, revision=self._name.revision, local_files_only=True, allow_patterns=[]
                )
            )
        except (OSError, ValueError):
            return None

    def _failed(self, error: Exception) -> CheckpointError:
        """What went wrong, and what to do."""
        errors, name, at = self._errors, self._name, self._endpoint
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        login = "log in with `hf auth login`, or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            said = f"{name.repository} is gated: ask for access at {at}/{name.repository}, then {login}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = f"there is no {name.repository} here nor at {at}; if it is private there, {login}"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"{name.repository} has no revision {name.revision!r}; see {at}/{name.repository}/commits/main"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            said = f"there is no {name} here nor in {self._cache}; to download it, unset HF_HUB_OFFLINE"
        elif isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            refused = f"; {login}" if status in (401, 403) else "; try again later"
            said = f"{at} answers {status} for {name} ({error.server_message or error.response.reason_phrase}){refused}"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            said = f"{self._cache} has {name} in part only; download it with HF_HUB_OFFLINE unset"
        elif isinstance(error, OSError) and error.strerror:
            said = f"cannot write {name} into {self._cache}: {error.strerror}"
        else:
            said = f"cannot download {name} from {at}, and no such folder is here: {_first_line(error)}"
        return CheckpointError(said)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

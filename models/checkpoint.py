"""A checkpoint on disk, opened without its weights: what it is, what it holds, and where each tensor is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from stageline.models import gguf_file, other_formats, safetensors_file
from stageline.models.errors import CheckpointError
from stageline.models.json_file import read_json_object
from stageline.models.packing.recognise import recognise
from stageline.models.packing.stated import statements
from stageline.models.tensors import Entry, TensorEntry, same_data
from stageline.models.weight_files import INDEX, SINGLE, complete, weight_files

_AUXILIARY = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Make one with `Checkpoint.open`."""

    path: Path
    """The folder, or the .gguf file."""
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    """config.json; of a .gguf its metadata without the arrays of its tokenizer."""
    stored: dict[str, TensorEntry]
    """The tensors as they lie in the files, by name."""
    tensors: dict[str, Entry]
    """The same, with each weight that is quantised with a method that is read in place of the tensors that hold it."""
    files: tuple[Path, ...]
    """The files that hold the weights."""
    tokenizer: Path | None
    """tokenizer.json, if there is one."""
    auxiliary: tuple[Path, ...]
    """The small files beside the weights that a bundle takes along, as far as they exist."""

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open a Hugging Face folder, one of its .safetensors files (with the other shards of its set), a .gguf file
        (with the other parts of its set), or a folder with one model in .gguf. Reads headers, never weights (but for a
        tensor that two shards hold).

        Raises:
            CheckpointError: nothing there, not a checkpoint, unsafe (pickled) or damaged.
        """
        try:
            if not path.exists():
                raise CheckpointError(
                    f"{path} does not exist; give a checkpoint's folder or a .gguf file, or ORG/NAME of the Hub"
                )
            if path.is_dir():
                if (path / "config.json").is_file():
                    return _open_folder(path)
                return _open_gguf(path, _only_gguf(path))
            if path.suffix == ".gguf":
                return _open_gguf(path, path)
            if path.suffix == ".safetensors":
                return _open_folder(path.parent, path.name)
            raise CheckpointError(
                f"{path} is neither a folder nor a .gguf or .safetensors file; give the checkpoint's folder"
            )
        except OSError as error:
            raise CheckpointError(f"cannot look into {path}: {error.strerror}") from error


def _open_folder(folder: Path, file: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, with the weights of the set that `file` is of if it is given."""
    config = read_json_object(folder / "config.json")
    names = other_formats.names(folder, "*.safetensors", "*.json")
    adapted = "adapter_config.json" in names
    if adapted and (SINGLE in names or INDEX in names):
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter beside it (adapter_config.json); move that file away if the "
            "adapter is merged into the model already, else merge it and export what that saves"
        )
    if adapted:
        raise CheckpointError(_why_no_weights(folder))
    found = weight_files(names, folder) if file is None else complete(file, names, folder)
    if found is None:
        raise CheckpointError(_why_no_weights(folder))
    if found.index is not None:
        files, tensors = _read_shards(folder / found.index)
    else:
        files, tensors = _read_files([folder / name for name in found.files])
    return Checkpoint(
        path=folder,
        kind="safetensors",
        config=config,
        stored=tensors,
        tensors=recognise(statements(config, folder), config, tensors),
        files=files,
        tokenizer=_tokenizer(folder),
        auxiliary=_auxiliary(folder),
    )


def _read_files(files: Sequence[Path]) -> tuple[tuple[Path, ...], dict[str, TensorEntry]]:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in safetensors_file.read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file} and {tensors[name].file.name} both hold tensor {name!r}, and no {INDEX} says which is the "
                    "model's; download that file"
                )
            tensors[name] = entry
    return tuple(files), tensors


def shards_of(index: Path) -> dict[str, str]:
    """The shard that holds each tensor, by the index of a sharded checkpoint. CheckpointError if it is not valid."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name, shard in weight_map.items():
        # Judged by its text: the Hub's cache makes every file a link out of the folder, so resolving would refuse it.
        if not isinstance(shard, str) or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise CheckpointError(
                f"{index} puts tensor {name!r} into {shard!r}, outside the folder; do not trust this checkpoint"
            )
    return weight_map


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorEntry]]:
    folder, weight_map = index.parent, shards_of(index)
    names_by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_by_shard.setdefault(shard, []).append(name)

    copies: dict[str, list[TensorEntry]] = {}
    for shard, names in sorted(names_by_shard.items()):
        file = folder / shard
        if not file.is_file():
            raise CheckpointError(
                f"{folder} lacks the shard {shard!r}, which holds {len(names)} of the {len(weight_map)} tensors; "
                "download it"
            )
        held = safetensors_file.read_header(file)
        for name in names:
            if name not in held:
                raise CheckpointError(
                    f"{file} lacks tensor {name!r}, which {index.name} puts there; download both again"
                )
        for name, entry in held.items():  # transformers reads what the index does not list as well
            copies.setdefault(name, []).append(entry)
    return tuple(folder / shard for shard in sorted(names_by_shard)), {
        name: _one_of(folder, entries) for name, entries in copies.items()
    }


def _one_of(folder: Path, copies: list[TensorEntry]) -> TensorEntry:
    """The tensor that several shards may hold."""
    first, *others = copies
    for other in others:
        if not same_data(first, other):
            raise CheckpointError(
                f"{folder} holds tensor {first.name!r} in {first.file.name} and in {other.file.name}, with different "
                "values; download both again"
            )
    return first


def _why_no_weights(folder: Path) -> str:
    ggufs = other_formats.names(folder, "*.gguf")
    adapter = other_formats.adapter(folder)
    if adapter:
        return f"{folder} {adapter}"
    if ggufs:
        return f"{folder} has its weights in {ggufs[0]}; give that file's path instead of the folder's"
    return other_formats.what_it_holds(folder) or (
        f"{folder} has no weights (model.safetensors or {INDEX}); download them"
    )


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    metadata, tensors, files = gguf_file.read_model(file)
    return Checkpoint(
        path=path,
        kind="gguf",
        config=metadata,
        stored=tensors,
        tensors=dict(tensors),
        files=files,
        tokenizer=_tokenizer(file.parent),
        auxiliary=_auxiliary(file.parent),
    )


def _only_gguf(folder: Path) -> Path:
    names = other_formats.names(folder, "*.gguf")
    models = gguf_file.model_files(names, folder)
    if len(models) > 1:
        raise CheckpointError(f"{folder} has {len(names)} .gguf files ({', '.join(names[:4])}); give one's path")
    if not names:
        raise CheckpointError(other_formats.what_it_holds(folder) or _why_no_config(folder))
    return folder / models.pop()[0]


def _why_no_config(folder: Path) -> str:
    inside = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if other_formats.names(folder, "*.safetensors"):
        return f"{folder} has weights but no config.json, which says what model they are of; download it"
    if inside and (folder / "modules.json").is_file():
        return (
            f"{folder} has modules.json but no config.json: it keeps its Transformer in a folder of its own "
            f"({inside[0]}); move that folder's files up, beside modules.json, and set its path there to ''"
        )
    if inside:
        return f"{folder} has neither config.json nor a .gguf file, but its folder {inside[-1]} has; give that folder"
    return f"{folder} has neither config.json nor a .gguf file; give a checkpoint's folder"


def _tokenizer(folder: Path) -> Path | None:
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def _auxiliary(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in _AUXILIARY if (folder / name).is_file())

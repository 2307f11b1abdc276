"""How a sentence-transformers checkpoint turns the vectors of a text's tokens into one vector of the text."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from stageline.models.checkpoint import Checkpoint, read_json_object
from stageline.models.errors import CheckpointError

_NAMED_BY = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
PoolingMode = Literal["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]

_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentencePooling:
    """What follows the Transformer in a sentence-transformers checkpoint."""

    mode: PoolingMode
    normalize: bool
    """Whether the vector is scaled to length 1 at the end."""
    max_seq_length: int | None
    """The tokens, special ones included, at which sentence-transformers truncates a text; None if not stated."""
    lower_case: bool = False
    """Whether sentence-transformers lowers a text before its tokenizer reads it."""


def pooling(checkpoint: Checkpoint) -> SentencePooling | None:
    """Read modules.json and what it names; None if the checkpoint has none, so is not one of sentence-transformers.

    Raises:
        CheckpointError: the modules are damaged, or other than a Transformer, one pooling mode and a normalisation.
    """
    modules_file = checkpoint.path / "modules.json"
    if not modules_file.is_file():
        return None
    kinds = [_kind(modules_file, module) for module in _modules(modules_file)]
    names = [name for name, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{modules_file} chains {', '.join(names) or 'nothing'}; supported is Transformer, Pooling and optionally "
            "Normalize. Export the checkpoint without its modules.json to get the tokens' vectors"
        )
    transformer_path, pooling_path = kinds[0][1], kinds[1][1]
    if transformer_path:
        raise CheckpointError(
            f"{modules_file} puts the Transformer into {transformer_path!r}; move its files up, beside modules.json"
        )
    file, stated = _transformer_settings(checkpoint.path)
    return SentencePooling(
        mode=_mode(checkpoint.path / pooling_path / "config.json"),
        normalize="Normalize" in names,
        max_seq_length=_max_seq_length(file, stated),
        lower_case=bool(stated.get("do_lower_case")),
    )


def _modules(file: Path) -> list[Any]:
    try:
        modules = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(modules, list):
        raise CheckpointError(
            f"{file} holds a {type(modules).__name__}, a list of modules is needed; download it again"
        )
    return modules


def _kind(file: Path, module: Any) -> tuple[str, str]:
    """A module's class name and its folder. The package's inner layout changes between versions, the class does not."""
    kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(path, str):
        raise CheckpointError(f"{file} has the module {module!r}, which lacks type or path; download it again")
    if not kind.startswith("sentence_transformers."):
        raise CheckpointError(f"{file} has a module of type {kind!r}, which is its own code; it cannot be exported")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise CheckpointError(f"{file} has a module in {path!r}, outside the folder; do not trust this checkpoint")
    return kind.rpartition(".")[2], path


def _mode(file: Path) -> PoolingMode:
    config = read_json_object(file)
    # Older versions store a flag for each mode, newer ones the mode's name.
    if "pooling_mode" in config:
        for mode in get_args(PoolingMode):
            if mode == config["pooling_mode"]:
                return mode  # type: ignore[no-any-return]
        raise CheckpointError(
            f"{file} has the pooling mode {config['pooling_mode']!r}, known are {', '.join(get_args(PoolingMode))}"
        )
    on = [flag for flag, value in config.items() if flag.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in _FLAGS:
        raise CheckpointError(
            f"{file} sets {' and '.join(on) or 'no pooling mode'}; supported is exactly one of {', '.join(_FLAGS)}"
        )
    return _FLAGS[on[0]]


def _transformer_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """What sentence-transformers stores of its Transformer, and in which file; older versions named it by the model."""
    files = [folder / f"sentence_{name}_config.json" for name in _NAMED_BY]
    file = next((file for file in files if file.is_file()), files[0])
    return file, read_json_object(file) if file.is_file() else {}


def _max_seq_length(file: Path, stated: dict[str, Any]) -> int | None:
    length = stated.get("max_seq_length")
    if length is not None and (type(length) is not int or length <= 0):
        raise CheckpointError(f"{file} has the max_seq_length {length!r}, a positive number is needed; correct it")
    return length

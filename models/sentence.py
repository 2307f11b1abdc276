"""How a sentence-transformers checkpoint turns the vectors of a text's tokens into one vector of the text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.json_file import read_json_object

_NAMED_BY = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
PoolingMode = Literal["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]

_STEPS = frozenset({"Dense", "LayerNorm", "Normalize"})
_PLAIN = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
_CHANGE_THE_VECTOR = frozenset(
    {"transformer_task", "module_output_name", "processing_kwargs", "query_length", "document_length",
     "query_expansion", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"}
)  # fmt: skip
# In the order in which sentence-transformers joins them.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Dense:
    """A linear layer and its activation; its tensors are in `folder`/model.safetensors."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    """The name of a class of torch.nn without parameters."""
    residual: bool
    """Whether its input is added to its output, through a linear layer of its own if the widths differ."""


@dataclass(frozen=True)
class LayerNorm:
    """A layer normalisation; its tensors are in `folder`/model.safetensors."""

    folder: str
    width: int


@dataclass(frozen=True)
class Normalize:
    """The vector is scaled to length 1."""


Step = Dense | LayerNorm | Normalize


@dataclass(frozen=True)
class SentencePooling:
    """What a sentence-transformers checkpoint does around its Transformer."""

    modes: tuple[PoolingMode, ...]
    """How the tokens' vectors become one; the results of several modes are joined in this order."""
    steps: tuple[Step, ...] = ()
    """What follows the pooling."""
    truncate_dim: int | None = None
    """How many of a vector's first values are kept, in the end; None: all."""
    max_seq_length: int | None = None
    """The tokens, special ones included, at which sentence-transformers truncates a text; None if not stated."""
    lower_case: bool = False
    """Whether sentence-transformers lowers a text before its tokenizer reads it."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by name."""
    default_prompt: str | None = None
    """The name of the prompt that a text has if none is chosen."""
    similarity: Similarity = "cosine"
    """How two vectors are compared."""


def pooling(checkpoint: Checkpoint) -> SentencePooling | None:
    """Read modules.json and what it names; None if the checkpoint has none, so is not one that embeds sentences.

    Raises:
        CheckpointError: the modules are damaged, or other than a Transformer, a Pooling, and any of Dense, LayerNorm
            and Normalize.
    """
    modules_file = checkpoint.path / "modules.json"
    if not modules_file.is_file():
        return None
    settings_file = checkpoint.path / "config_sentence_transformers.json"
    settings = read_json_object(settings_file) if settings_file.is_file() else {}
    model = settings.get("model_type", "SentenceTransformer")
    if model == "CrossEncoder":
        return None
    kinds = modules_of(modules_file)
    names = [name for name, _ in kinds]
    if model != "SentenceTransformer" or names[:2] != ["Transformer", "Pooling"] or not set(names[2:]) <= _STEPS:
        raise CheckpointError(
            f"{modules_file} chains {', '.join(names) or 'nothing'} of a {model}; supported is a SentenceTransformer "
            f"of Transformer, Pooling and any of {', '.join(sorted(_STEPS))}. Export the checkpoint without its "
            "modules.json to get the tokens' vectors"
        )
    transformer_path, pooling_path = kinds[0][1], kinds[1][1]
    if transformer_path:
        raise CheckpointError(
            f"{modules_file} puts the Transformer into {transformer_path!r}; move its files up, beside modules.json"
        )
    file, stated = transformer_settings(checkpoint.path, _PLAIN)
    prompts = prompts_of(settings_file, settings)
    modes_file = checkpoint.path / pooling_path / "config.json"
    modes = read_json_object(modes_file)
    if modes.get("include_prompt") is False and any(prompts.values()):
        raise CheckpointError(
            f"{modes_file} leaves the prompt out of the pooling (include_prompt), which a stage cannot; remove the "
            f"prompts from {settings_file.name} to embed texts without any"
        )
    return SentencePooling(
        modes=_modes(modes_file, modes),
        steps=tuple(_step(checkpoint.path, name, path) for name, path in kinds[2:]),
        truncate_dim=_whole("truncate_dim", settings_file, settings),
        max_seq_length=max_seq_length(file, stated),
        lower_case=bool(stated.get("do_lower_case")),
        prompts=prompts,
        default_prompt=_default_prompt(settings_file, settings, prompts),
        similarity=_similarity(settings_file, settings),
    )


def modules_of(file: Path) -> list[tuple[str, str]]:
    """The class names and folders of the modules that `file`, a modules.json, chains, without those that do nothing."""
    try:
        modules = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(modules, list):
        raise CheckpointError(
            f"{file} holds a {type(modules).__name__}, a list of modules is needed; download it again"
        )
    kinds = [_kind(file, module) for module in modules]
    return [(name, path) for name, path in kinds if name != "Dropout"]  # it does nothing outside training


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


def _modes(file: Path, config: dict[str, Any]) -> tuple[PoolingMode, ...]:
    # Older versions store a flag for each mode, newer ones the modes' names.
    if "pooling_mode" not in config:
        on = [flag for flag, value in config.items() if flag.startswith("pooling_mode_") and value]
        if not on or not set(on) <= _FLAGS.keys():
            raise CheckpointError(
                f"{file} sets {' and '.join(on) or 'no pooling mode'}; supported are {', '.join(_FLAGS)}"
            )
        return tuple(mode for flag, mode in _FLAGS.items() if flag in on)
    stated = config["pooling_mode"]
    modes = tuple(stated) if isinstance(stated, list) and stated else (stated,)
    for mode in modes:
        if mode not in get_args(PoolingMode):
            raise CheckpointError(f"{file} has the pooling mode {mode!r}, known are {', '.join(get_args(PoolingMode))}")
    return modes


def _step(folder: Path, name: str, path: str) -> Step:
    """One module after the pooling."""
    file = folder / path / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    for key in "module_input_name", "module_output_name":
        if config.get(key) not in (None, "sentence_embedding"):
            raise CheckpointError(f"{file} has the {key} {config[key]!r}; supported is sentence_embedding")
    if name == "Normalize":
        return Normalize()
    if name == "LayerNorm":
        return LayerNorm(path, _size(file, config, "dimension"))
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(activation, str) or not activation.startswith("torch.nn.modules."):
        raise CheckpointError(f"{file} has the activation_function {activation!r}, which is its own code")
    return Dense(
        folder=path,
        in_features=_size(file, config, "in_features"),
        out_features=_size(file, config, "out_features"),
        bias=bool(config.get("bias", True)),
        activation=activation.rpartition(".")[2],
        residual=bool(config.get("use_residual")),
    )


def _size(file: Path, config: dict[str, Any], key: str) -> int:
    size = config.get(key)
    if type(size) is not int or size <= 0:
        raise CheckpointError(f"{file} has the {key} {size!r}, a positive number is needed; download it again")
    return size


def prompts_of(file: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The prompts that `settings`, read from `file`, give by name."""
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{file} has prompts that are no texts by name; correct them")
    return prompts


def _default_prompt(file: Path, settings: dict[str, Any], prompts: Mapping[str, str]) -> str | None:
    name = settings.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise CheckpointError(f"{file} has the default_prompt_name {name!r}, which prompts lacks; correct it")
    return name


def _similarity(file: Path, settings: dict[str, Any]) -> Similarity:
    stated = settings.get("similarity_fn_name") or "cosine"
    for similarity in get_args(Similarity):
        if similarity == stated:
            return similarity  # type: ignore[no-any-return]
    raise CheckpointError(f"{file} has the similarity {stated!r}, known are {', '.join(get_args(Similarity))}")


def transformer_settings(folder: Path, plain: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """What sentence-transformers stores of its Transformer, and in which file; older versions named it by the model.

    `plain`: values of keys that ask for nothing else than the model itself gives. CheckpointError for others.
    """
    files = [folder / f"sentence_{name}_config.json" for name in _NAMED_BY]
    file = next((file for file in files if file.is_file()), files[0])
    stated = read_json_object(file) if file.is_file() else {}
    for key in sorted(stated.keys() & _CHANGE_THE_VECTOR):
        if stated[key] and stated[key] != plain.get(key):
            raise CheckpointError(f"{file} has {key} {stated[key]!r}, which is not supported; export it without")
    return file, stated


def max_seq_length(file: Path, stated: Mapping[str, Any]) -> int | None:
    """The tokens at which `stated`, read from `file`, truncates a text; None if it does not say."""
    return _whole("max_seq_length", file, stated)


def _whole(key: str, file: Path, stated: Mapping[str, Any]) -> int | None:
    number = stated.get(key)
    if number is not None and (type(number) is not int or number <= 0):
        raise CheckpointError(f"{file} has the {key} {number!r}, a positive number is needed; correct it")
    return number

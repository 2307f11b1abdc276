"""Which tensor of a safetensors checkpoint each of the model's is, as transformers would load them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from stageline.exporter import unused_tensors
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.models.quantisation import is_narrow, not_stated, quantised_with
from stageline.models.tensors import Entry, same_data
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class TensorsError(ExportError):
    """The checkpoint's tensors are not those of the model, however it is traced."""


@dataclass(frozen=True)
class Match:
    """What was found. `names` maps a parameter or buffer to a checkpoint's tensor; `missing` are those without one,
    which is a fault only if the task's outputs need them."""

    names: Mapping[str, str]
    missing: frozenset[str]
    converted: bool
    """Whether transformers has to merge or split tensors to get the model's; then `names` are the model's own."""
    notes: tuple[str, ...]


def match(checkpoint: Checkpoint, model: Any) -> Match:
    """Match the model's tensors with the checkpoint's. Parameters that the config ties, but the checkpoint stores with
    different values, are untied in `model`, as transformers does.

    Raises:
        TensorsError: a tensor has another shape or kind than the model's, is stored twice with different values, or
            belongs to a module of the model that has no such tensor.
    """
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    names: dict[str, str] = {}
    unused: dict[str, str] = {}
    targets: dict[str, str] = {}
    parts: dict[str, str] = {}
    for name in checkpoint.tensors:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # stored under the model's own name already
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            unused[name] = renamed
            continue
        targets[name] = renamed
        if pattern is not None:
            parts.setdefault(renamed, name)
        else:
            _once(checkpoint, renamed, names.setdefault(renamed, name), name)
    if not names and not parts:
        raise missing_error(checkpoint, model, state)
    try:
        notes = unused_tensors.account(checkpoint, model, unused)
    except ExportError as error:
        raise TensorsError(str(error)) from error
    for target in sorted(names.keys() & parts.keys()):
        raise TensorsError(
            f"{checkpoint.path} holds {target} twice, whole ({names[target]}) and in parts ({parts[target]}); remove "
            "the wrong one"
        )
    for name, target in targets.items():
        _check_plain(checkpoint, checkpoint.tensors[name], state[target])
    notes += _untie(checkpoint, model, names)
    if parts:
        return Match({name: name for name in state}, frozenset(), True, notes)
    found = _sources(checkpoint, model, names)
    return Match(found, frozenset(_lacking(model, found)), False, notes)


def missing_error(checkpoint: Checkpoint, model: Any, missing: Iterable[str]) -> TensorsError:
    """The error for tensors of the model that the outputs need and the checkpoint does not have."""
    lacking = sorted(missing)
    method = quantised_with(checkpoint.tensors)
    if method is not None:
        hint = f"it is {not_stated(method)}"
    elif lacking == ["lm_head.weight"]:
        hint = "if the embeddings are the head, set tie_word_embeddings to true in its config.json"
    elif "tok_embeddings.weight" in checkpoint.tensors:
        hint = "its tensors have the names of Meta's or Mistral's own code: use the checkpoint in Hugging Face's layout"
    elif (last := max(map(_layer, checkpoint.tensors))) < min(map(_layer, lacking)):
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", "more")
        hint = f"config.json states {layers} layers, the tensors reach layer {last}; correct num_hidden_layers"
    elif prefix := _before(checkpoint, lacking):
        hint = (
            f"it holds them with {prefix!r} before these names, so they were saved from a wrapper around the model "
            "(DistributedDataParallel, torch.compile) or from a larger model: bring the config.json of the larger one, "
            "or save the tensors without that prefix"
        )
    else:
        hint = "choose the --task, or bring the config.json, it was saved for"
    return TensorsError(
        f"{checkpoint.path} lacks {unused_tensors.listed(lacking)}, which {type(model).__name__} needs (transformers "
        f"would draw random values); {hint}"
    )


def _layer(name: str) -> int:
    """The number of the layer that a tensor is of; -1 if its name has none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _before(checkpoint: Checkpoint, lacking: Sequence[str]) -> str | None:
    """What stands before the names of most of the tensors that are lacking; None if the checkpoint has no such."""
    first = next((name for name in checkpoint.tensors if name.endswith(tuple(f".{name}" for name in lacking))), "")
    found = {first.removesuffix(name) for name in lacking if first.endswith(f".{name}")}
    most = len(lacking) / 2
    return next((p for p in found if sum(f"{p}{name}" in checkpoint.tensors for name in lacking) > most), None)


def _once(checkpoint: Checkpoint, target: str, first: str, second: str) -> None:
    if first != second and not same_data(checkpoint.tensors[first], checkpoint.tensors[second]):
        raise TensorsError(
            f"{checkpoint.path} holds {target} twice with different values, as {first} and as {second}; remove the "
            "wrong one"
        )


def _untie(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> tuple[str, ...]:
    """Give each tied parameter that is stored with values of its own a parameter of its own."""
    notes = []
    for aliases in _tied(model).values():
        stored = [alias for alias in aliases if alias in names]
        for alias in stored[1:]:
            if not same_data(checkpoint.tensors[names[stored[0]]], checkpoint.tensors[names[alias]]):
                module, _, leaf = alias.rpartition(".")
                parameter = model.get_parameter(alias)
                own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
                setattr(model.get_submodule(module), leaf, own)
                notes.append(
                    f"config.json ties {alias} to {stored[0]}, but both are stored, with different values: "
                    "each keeps its own, as in transformers"
                )
    return tuple(notes)


def _tied(model: Any) -> dict[int, list[str]]:
    """The names of each distinct parameter. What transformers ties others to comes first."""
    sources = set(model.get_expanded_tied_weights_keys(all_submodels=True).values())
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    return {key: sorted(names, key=lambda name: name not in sources) for key, names in tied.items()}


def _sources(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """The stored tensor of each parameter and persistent buffer that has one in `names`; parameters tied together share
    one."""
    found: dict[str, str] = {}
    for aliases in _tied(model).values():
        source = next((names[alias] for alias in aliases if alias in names), None)
        if source is not None:
            found.update(dict.fromkeys(aliases, source))
    kept = model.state_dict().keys()  # transformers ignores a stored tensor for a buffer that is not
    found.update({name: names[name] for name, _ in model.named_buffers() if name in kept and name in names})
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    for name, source in found.items():
        _fits(checkpoint, model.config.get_text_config(), checkpoint.tensors[source], tensors[name])
    return found


def _check_plain(checkpoint: Checkpoint, stored: Entry, tensor: torch.Tensor) -> None:
    plain = "float" in stored.dtype and not is_narrow(stored.dtype)
    if tensor.is_floating_point() and not plain:
        raise TensorsError(
            f"{checkpoint.path}: tensor {stored.name} holds {stored.dtype}, where the model has real numbers, so the "
            f"checkpoint is {not_stated(quantised_with(checkpoint.tensors))}"
        )


def _fits(checkpoint: Checkpoint, config: Any, stored: Entry, tensor: torch.Tensor) -> None:
    if stored.shape != tuple(tensor.shape):
        raise TensorsError(
            f"{checkpoint.path}: tensor {stored.name} has shape {list(stored.shape)} but config.json makes it "
            f"{list(tensor.shape)}; {_why_another_shape(config, stored, tensor)}"
        )


def _why_another_shape(config: Any, stored: Entry, tensor: torch.Tensor) -> str:
    if 0 in stored.shape:
        return (
            "it is empty, as where a model that is spread over processes (DeepSpeed ZeRO-3, FSDP) is saved by one of "
            "them; gather the weights (zero_to_fp32.py) and export what that saves"
        )
    rows = getattr(config, "vocab_size", None)
    if stored.shape[1:] == tensor.shape[1:] and tensor.shape[:1] == (rows,):
        return f"if the vocabulary was changed, set vocab_size from {rows} to {stored.shape[0]} there"
    return "the config and the weights are of different models"


def _lacking(model: Any, found: Mapping[str, str]) -> set[str]:
    """The parameters, and the persistent buffers of real numbers, that are not stored. (Buffers of integers, masks and
    indices, follow from the config.)"""
    kept = model.state_dict().keys()
    buffers = {name for name, buffer in model.named_buffers() if buffer.is_floating_point() and name in kept}
    return ({name for name, _ in model.named_parameters(remove_duplicate=False)} | buffers) - found.keys()

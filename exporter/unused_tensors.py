"""What becomes of the checkpoint's tensors that the model does not take: derived, of another head, or a refusal."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import ExportError
from stageline.models.quantisation import not_stated, quantised_with
from transformers import PreTrainedModel

# What older versions stored and newer ones compute from the config, by the last part of the name; and the token that
# masks image patches in pretraining only.
_DERIVED = frozenset(
    {
        "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids", "token_type_ids", "masked_bias",
        "causal_mask", "num_batches_tracked", "relative_position_index", "relative_coords_table", "mask_token",
    }
)  # fmt: skip
_NAMED = 4  # names in a message


def account(checkpoint: Checkpoint, model: Any, unused: Mapping[str, str]) -> tuple[str, ...]:
    """Judge each unused tensor (its name -> the name that transformers gives it in the model), and return what a user
    should know of those that are left out.

    Raises:
        ExportError: some lie inside modules that the model has, so the model is another than config.json says.
    """
    inside = []
    parts: Counter[str] = Counter()
    for name, renamed in unused.items():
        if _is_derived(checkpoint, model, name, renamed):
            continue
        part = _part(model, renamed)
        if part is None:
            inside.append(name)
        else:
            parts[part] += 1
    if inside:
        raise ExportError(_refusal(checkpoint, model, inside, unused))
    if not parts:
        return ()
    groups = ", ".join(f"{part} ({count})" for part, count in parts.most_common(_NAMED))
    rest = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return (
        f"{parts.total()} of the checkpoint's {len(checkpoint.tensors)} tensors are of parts that "
        f"{type(model).__name__} does not have: {groups}{rest}",
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{count} ({', '.join(names[:_NAMED])}{more})"


def _is_derived(checkpoint: Checkpoint, model: Any, name: str, renamed: str) -> bool:
    """Whether the model computes it, or transformers knows that the model does not need it."""
    last = renamed.rpartition(".")[2]
    if last in _DERIVED or checkpoint.tensors[name].dtype in ("bool", "int64"):  # masks and indices
        return True
    if any(buffer == renamed for buffer, _ in model.named_buffers()):
        return True
    patterns = model._keys_to_ignore_on_load_unexpected or ()  # of the model and the models in it
    if any(re.search(pattern, renamed) for pattern in patterns):
        return True
    return _predicts_further(model.config.get_text_config(), renamed)


def _predicts_further(config: Any, renamed: str) -> bool:
    """Whether it is of the layers behind the last one that predict further tokens (DeepSeek-V3, GLM-4.5)."""
    layers = getattr(config, "num_hidden_layers", None)
    further = getattr(config, "num_nextn_predict_layers", None)
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", renamed)
    return bool(found and layers and further and layers <= int(found[1]) < layers + further)


def _part(model: Any, renamed: str) -> str | None:
    """The part of a larger model that it belongs to and this model does not have; None if the tensor lies inside a
    block or a module with tensors of its own, where it would change what that computes."""
    module = model
    components = renamed.split(".")
    for depth, component in enumerate(components):
        repeated = isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
        if repeated or (module._parameters and not isinstance(module, PreTrainedModel)):
            return None
        if component not in module._modules:
            return ".".join(components[: depth + 1])
        module = module._modules[component]
    return None


def _refusal(checkpoint: Checkpoint, model: Any, inside: list[str], unused: Mapping[str, str]) -> str:
    method = quantised_with(inside)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    beyond = [
        int(found[1])
        for name in inside
        if (found := re.search(r"\.(\d+)\.", unused[name])) and layers is not None and int(found[1]) >= layers
    ]
    if method is not None:
        why = f"it is {not_stated(method)}"
    elif any("lora_" in name or ".modules_to_save." in name for name in inside):
        why = "they are of an adapter; merge it into the model (peft's merge_and_unload) and export that"
    elif beyond:
        why = f"config.json states {layers} layers, the tensors reach layer {max(beyond)}; correct num_hidden_layers"
    else:
        why = "without them the model computes something else; bring the config.json they were saved with"
    where = f"inside modules of {type(model).__name__} that have no such tensor"
    return f"{checkpoint.path} holds {listed(inside)} {where}: {why}"

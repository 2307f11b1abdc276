"""Classifiers that read the last token of each row, and know no padding token to find it by: the mask finds it.

transformers' decoders with a classifier take the last token that is not `pad_token_id`. If the config has none (or one
that is no token, as the -1 of the first Llamas), transformers runs rows one by one, whose last token is the last place.
"""

import copy
from typing import Any

import torch


def lacks_padding(model: Any) -> bool:
    """Whether the model classifies texts, and its config names no token that fills rows."""
    config = model.config.get_text_config()
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    classifies = type(model).__name__.endswith("ForSequenceClassification") and not config.is_encoder_decoder
    return classifies and size is not None and (pad is None or not 0 <= pad < size)


def find_by_mask(model: Any) -> None:
    """Make the model, if it lacks a padding token, read the last token that its mask has."""
    if not lacks_padding(model):
        return
    none = model.config.get_text_config().vocab_size  # an id that no text has
    model.config = copy.deepcopy(model.config)
    model.config.pad_token_id = none
    model.config.get_text_config().pad_token_id = none

    def mark(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        ids = torch.where(named["attention_mask"] == 0, none, named["input_ids"])
        return arguments, {**named, "input_ids": ids}

    def unmark(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> Any:
        (ids,) = arguments
        return (torch.where(ids == none, 0, ids),)

    model.register_forward_pre_hook(mark, with_kwargs=True)
    model.get_input_embeddings().register_forward_pre_hook(unmark)

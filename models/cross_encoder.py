"""What a CrossEncoder of sentence-transformers says of its scores, in the files beside its weights."""

from dataclasses import dataclass
from typing import Any

from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import CheckpointError
from stageline.models.json_file import read_json_object
from stageline.models.sentence import max_seq_length, modules_of, prompts_of, transformer_settings

_PLAIN = {"transformer_task": "sequence-classification", "module_output_name": "scores"}


@dataclass(frozen=True)
class CrossEncoder:
    """How a CrossEncoder reads a pair and what it makes of its logits."""

    activation: str | None
    """The class that makes scores of logits; None: its default, a sigmoid of one label and the logits of several."""
    max_seq_length: int | None = None
    """As in SentencePooling."""
    lower_case: bool = False
    """As in SentencePooling."""


def cross_encoder(checkpoint: Checkpoint) -> CrossEncoder | None:
    """Read what sentence-transformers wrote, now beside config.json and formerly in it; None if it wrote nothing, so
    that transformers' rules hold.

    Raises:
        CheckpointError: its modules are more than a Transformer, or it puts a prompt before its texts.
    """
    settings_file = checkpoint.path / "config_sentence_transformers.json"
    settings = read_json_object(settings_file) if settings_file.is_file() else {}
    section, old = (
        checkpoint.config.get(key) for key in ("sentence_transformers", "sbert_ce_default_activation_function")
    )
    if settings.get("model_type") != "CrossEncoder" and not isinstance(section, dict) and not isinstance(old, str):
        return None
    modules_file = checkpoint.path / "modules.json"
    modules = modules_of(modules_file) if modules_file.is_file() else [("Transformer", "")]
    if modules != [("Transformer", "")]:
        raise CheckpointError(
            f"{modules_file} chains {', '.join(name for name, _ in modules)} of a CrossEncoder; supported is a "
            "Transformer alone, in the same folder. --task exports what the Transformer itself gives"
        )
    default = settings.get("default_prompt_name")
    if default is not None and prompts_of(settings_file, settings).get(default):
        raise CheckpointError(
            f"{settings_file} puts the prompt {default!r} before each text, which is not supported for pairs; remove "
            "default_prompt_name, and put it into your texts"
        )
    file, stated = transformer_settings(checkpoint.path, _PLAIN)
    named: Any = settings.get("activation_fn") or (section or {}).get("activation_fn") or old
    return CrossEncoder(
        named if isinstance(named, str) else None, max_seq_length(file, stated), bool(stated.get("do_lower_case"))
    )

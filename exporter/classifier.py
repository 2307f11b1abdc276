"""A classifier's labels, and what makes scores of its logits, as transformers' pipelines choose."""

from typing import Any

from stageline.exporter.trace_model import Wanted
from stageline.runtime.bundle.manifest import Activation

_CLASSIFIES = ("text-classification", "token-classification", "image-classification")
_TORCH: dict[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def labels(wanted: Wanted) -> tuple[str, ...] | None:
    """The names of a classifier's outputs, in their order; None for other tasks."""
    names = getattr(wanted.config, "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names)) if wanted.task in _CLASSIFIES and names else None


def activation(wanted: Wanted) -> Activation:
    """What sentence-transformers' CrossEncoder states in config.json, else by the rules of transformers' pipelines."""
    config = wanted.config
    if wanted.task not in ("text-classification", "image-classification"):
        return "softmax"
    stated = _cross_encoder(config)
    if stated is not None:
        name = stated.rpartition(".")[2]
        if name in _TORCH and stated.startswith("torch.nn."):
            return _TORCH[name]
        wanted.notes.append(f"config.json asks for the activation {stated!r}, which is not followed: scores are logits")
        return "none"
    if config.problem_type == "regression":
        return "none"
    several = config.problem_type == "multi_label_classification"
    return "sigmoid" if several or config.num_labels == 1 else "softmax"


def _cross_encoder(config: Any) -> str | None:
    """The class that a CrossEncoder was saved with, under the key of new or of old versions."""
    section = getattr(config, "sentence_transformers", None)
    stated = section.get("activation_fn") if isinstance(section, dict) else None
    stated = stated or getattr(config, "sbert_ce_default_activation_function", None)
    return stated if isinstance(stated, str) else None

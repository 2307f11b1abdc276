"""A classifier's labels, and what makes scores of its logits, as transformers' pipelines or a CrossEncoder choose."""

from stageline.exporter.trace_model import Wanted
from stageline.runtime.bundle.manifest import Activation

_CLASSIFIES = ("text-classification", "token-classification", "image-classification")
_TORCH: dict[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def labels(wanted: Wanted) -> tuple[str, ...] | None:
    """The names of a classifier's outputs, in their order; None for other tasks."""
    names = getattr(wanted.config, "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names)) if wanted.task in _CLASSIFIES and names else None


def activation(wanted: Wanted) -> Activation:
    """What makes scores of logits: a CrossEncoder's own, else by the rules of transformers' pipelines."""
    config = wanted.config
    if wanted.task not in ("text-classification", "image-classification"):
        return "softmax"
    if wanted.cross_encoder is not None:
        return _of_a_cross_encoder(wanted, wanted.cross_encoder.activation)
    if config.problem_type == "regression":
        return "none"
    several = config.problem_type == "multi_label_classification"
    return "sigmoid" if several or config.num_labels == 1 else "softmax"


def _of_a_cross_encoder(wanted: Wanted, stated: str | None) -> Activation:
    usual: Activation = "sigmoid" if wanted.config.num_labels == 1 else "none"
    if stated is None:
        return usual
    if not stated.startswith("torch."):  # code that sentence-transformers does not run either
        wanted.notes.append(f"the CrossEncoder's activation {stated!r} is its own code; scores are as without it")
        return usual
    name = stated.rpartition(".")[2]
    if name not in _TORCH:
        wanted.notes.append(f"the CrossEncoder's activation {stated!r} is not followed: scores are logits")
    return _TORCH.get(name, "none")

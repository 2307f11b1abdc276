"""/v1/moderations: a classifier's labels as OpenAI's categories, where they say what is harmless and what is not."""

import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from stageline.runtime.service.errors import ApiError, json_response
from stageline.runtime.service.model import Model
from stageline.runtime.service.schema import Body, Texts
from stageline.runtime.service.scoring import classifier_scores, labels_of
from starlette.responses import Response

_HARMLESS = frozenset(
    {"ok", "okay", "safe", "neutral", "normal", "none", "benign", "clean", "acceptable", "harmless", "appropriate",
     "legit", "ham"}
)  # fmt: skip
"""Labels of nothing to object to, in letters alone; others are a "no", "not" or "non" before another label."""
_THRESHOLD = 0.5  # of labels that do not exclude each other


class _TextPart(Body):
    type: Literal["text"]
    text: str


def _texts(given: Any) -> Any:
    """Parts, as OpenAI's clients send them, are one text."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given and all(isinstance(part, dict) for part in given):
        return ["\n".join(_TextPart.model_validate(part).text for part in given)]
    return given


class ModerationRequest(Body):
    """/v1/moderations"""

    model: str | None = None
    """None: the first model that classifies."""
    input: Annotated[Texts, BeforeValidator(_texts)]
    truncate: bool = False


async def moderate(model: Model, body: ModerationRequest) -> Response:
    """Respond with the score of each label of each text, and whether it applies.

    Of labels that exclude each other the likeliest applies, of others those above 0.5. A text is flagged where a label
    applies that is not a harmless one.
    """
    labels = labels_of(model)
    activation = model.pipeline.bundle.manifest.activation
    harmless = [_is_harmless(label, labels) for label in labels]
    if activation == "none" or len(labels) < 2 or any(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        raise _unfit(model, labels)
    if activation == "softmax" and (all(harmless) or not any(harmless)):
        raise _unfit(model, labels)
    values, _ = await classifier_scores(model, body.input, None, "input", truncate=body.truncate)
    results = []
    for row in values:
        applies = row > _THRESHOLD if activation == "sigmoid" else row == row.max()
        kept = [place for place, free in enumerate(harmless) if not free]
        results.append(
            {
                "flagged": any(bool(applies[place]) for place in kept),
                "categories": {labels[place]: bool(applies[place]) for place in kept},
                "category_scores": {labels[place]: float(row[place]) for place in kept},
                "category_applied_input_types": {labels[place]: ["text"] for place in kept},
            }
        )
    return json_response({"id": f"modr-{uuid.uuid4().hex}", "model": model.name, "results": results})


def _is_harmless(label: str, labels: Sequence[str]) -> bool:
    letters = _letters(label)
    others = {_letters(other) for other in labels}
    return letters in _HARMLESS or any(letters.removeprefix(no) in others - {letters} for no in ("no", "not", "non"))


def _letters(label: str) -> str:
    return re.sub(r"[^a-z]", "", label.lower())


def _unfit(model: Model, labels: Sequence[str]) -> ApiError:
    named = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    return ApiError(
        400,
        f"the labels of the model {model.name!r} ({named}) do not say what is harmless; send requests to /classify",
        param="model",
    )

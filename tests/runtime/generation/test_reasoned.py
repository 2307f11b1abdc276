"""A structure that begins after the reasoning bars nothing before it but an end."""

import formats
import numpy as np
import pytest
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.generation.structure import Reasoning, Structure
from stageline.runtime.generation.text_model import TextModel

END = 1
WIDTH = len(formats.VOCABULARY)


@pytest.fixture(scope="module")
def model() -> TextModel:
    encoder = TextEncoder(formats.tokenizer().backend_tokenizer, 256, 2)
    return TextModel(WIDTH, GenerationDefaults(end_ids=(END,)), encoder)


def allowed(model: TextModel, begun: bool, text: str) -> tuple[set[str], bool]:
    """What may come after a text of ASCII, in which ( begins the reasoning and ) ends it, and whether it is whole."""
    assert model.encoder is not None
    begin, end = (model.encoder.ids(mark, special=False)[0] for mark in "()")
    structure = Structure("regex", "[xy]z", Reasoning(begin, end, begun))
    made = model.matcher(structure)
    assert made is not None
    matcher = made.copy()
    for token in model.encoder.ids(text, special=False):
        assert np.isfinite(matcher.masked(np.zeros(WIDTH, np.float32))[token])
        matcher.take(token)
    if matcher.complete:
        return set(), True
    scores = np.arange(WIDTH, dtype=np.float32)
    masked = matcher.masked(scores)
    kept = np.flatnonzero(np.isfinite(masked))
    np.testing.assert_array_equal(masked[kept], scores[kept])
    return {formats.VOCABULARY[token] for token in kept}, False


def test_it_begins_where_the_reasoning_ends(model: TextModel) -> None:
    anything = set(formats.VOCABULARY) - {"</s>"}
    for begun, text, next_ in (
        (True, "", anything), (True, "ab(", anything), (True, "ab)", {"x", "y"}), (True, ")x", {"z"}),
        (False, "", {"x", "y", "("}), (False, "(", anything), (False, "(a)", {"x", "y"}), (False, "x", {"z"}),
    ):  # fmt: skip
        assert allowed(model, begun, text) == (next_, False), (begun, text)
    assert allowed(model, True, "q)yz") == (set(), True)
    assert allowed(model, False, "yz") == (set(), True)


def test_an_impossible_one_is_refused_at_once(model: TextModel) -> None:
    with pytest.raises(RequestError, match="the regex cannot be followed"):
        model.matcher(Structure("regex", "(", Reasoning(5, 6, True)))

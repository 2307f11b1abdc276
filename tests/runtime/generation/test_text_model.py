"""A prompt that does not fit is refused with what would help."""

import pytest
from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.generation.text_model import TextModel


@pytest.mark.parametrize(
    ("positions", "advice"),
    [(None, "; shorten it, or open with a larger capacity"), (9, "; shorten it, or open with a larger capacity"),
     (8, ", as many as the model; shorten it"), (4, ", as many as the model; shorten it")],
)  # fmt: skip
def test_a_larger_capacity_is_advised_where_the_model_allows_it(positions: int | None, advice: str) -> None:
    model = TextModel(50, GenerationDefaults(), None, max_positions=positions)
    assert model.prompt_ids(range(8), 8) == list(range(8))
    with pytest.raises(RequestError) as refused:
        model.prompt_ids(range(9), 8)
    assert str(refused.value) == f"the prompt has 9 tokens, a cache slot holds 8{advice}"

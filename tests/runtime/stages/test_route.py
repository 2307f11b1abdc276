"""The steps through a chain of stages, as data."""

import pytest
from stageline.models.errors import BundleError
from stageline.runtime.stages.route import Hop, route

# ids -> h0 -> h1 -> (h2, logits); the last stage also reads h0 and the mask.
STAGES = [(["ids"], ["h0"]), (["h0"], ["h1"]), (["h1", "h0", "mask"], ["h2", "logits"])]
INPUTS = ["ids", "mask"]


def test_values_live_until_the_last_stage_that_reads_them() -> None:
    assert route(STAGES, INPUTS, ["logits"]) == (
        Hop(0, ("h0",), frozenset({"h0", "mask"})),
        Hop(1, ("h1",), frozenset({"h0", "h1", "mask"})),
        Hop(2, ("logits",), frozenset({"logits"})),
    )


def test_a_wanted_value_of_an_early_stage_is_kept_to_the_end() -> None:
    assert all("h1" in step.keep for step in route(STAGES, INPUTS, ["h1", "logits"])[1:])


def test_stages_after_the_last_wanted_value_are_left_out() -> None:
    assert [step.stage for step in route(STAGES, INPUTS, ["h1"])] == [0, 1]


def test_a_value_that_nobody_gives_is_named() -> None:
    with pytest.raises(BundleError, match="no stage computes 'mask' before it is read"):
        route(STAGES, ["ids"], ["logits"])
    with pytest.raises(BundleError, match="no stage computes 'h0' before it is read"):
        route(STAGES[1:], INPUTS, ["logits"])

"""What may be asked of a text's structure is checked when it is asked."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from stageline.models.errors import RequestError
from stageline.runtime.generation.request import Sampling
from stageline.runtime.generation.structure import MAX_BYTES, MAX_GRAMMAR_BYTES, Structure


def test_equal_structures_are_one() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert {Structure.json_schema(schema), Structure.json_schema(json.dumps(schema))} == {Structure.json_schema(schema)}
    assert Structure.json_object() == Structure.json_schema({"type": "object"})


def test_a_schema_keeps_the_order_of_its_properties_and_loses_options_of_the_library() -> None:
    schema = {"properties": {"b": {}, "a": {}}, "x-guidance": {"lenient": True}}
    assert json.loads(Structure.json_schema(schema).source) == {"properties": {"b": {}, "a": {}}}
    assert list(json.loads(Structure.json_schema(schema).source)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Structure.json_schema("[1]"), "the json_schema is a list; give an object"),
        (lambda: Structure.json_schema("{"), "the json_schema is not JSON"),
        (lambda: Structure.json_schema({"a": float("nan")}), "the json_schema is not JSON"),
        (lambda: Structure.json_schema({"a": {1, 2}}), "the json_schema is not JSON"),
        (lambda: Structure.json_schema({"const": "\ud800"}), "the json_schema is not valid Unicode"),
        (lambda: Structure.json_schema({"enum": ["x" * MAX_BYTES]}), f"at most {MAX_BYTES} are taken"),
        (lambda: Structure.json_schema("[" * 100_000), "the json_schema is not JSON"),
        (lambda: Structure.json_schema({"properties": {f"p{n}": {} for n in range(10_000)}}), "names 10000 properties"),
        (lambda: Structure.json_schema({"enum": [{f"p{n}": {}} for n in range(10_000)]}), "names 10000 properties"),
        (lambda: Structure.regex("x" * (MAX_GRAMMAR_BYTES + 1)), f"at most {MAX_GRAMMAR_BYTES} are taken"),
        (lambda: Structure.choice([f"x{n}" for n in range(1001)]), "choice has 1001 texts, at most 1000"),
        (lambda: Structure.regex(""), "the regex is ''; give a text that is not empty"),
        (lambda: Structure.choice([]), r"choice is \[\]; give a list of texts"),
        (lambda: Structure.choice("ab"), "choice is 'ab'; give a list of texts"),
        (lambda: Structure.choice(["a", ""]), "choice holds ''; give texts that are not empty"),
        (lambda: Sampling.of({"structure": "[0-9]"}), r"structure is '\[0-9\]'; give a Structure"),
    ],
)
def test_what_is_no_structure_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()

"""OpenAI's own client asks for texts of a structure, and gets them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app
from starlette.testclient import TestClient

CHAT: list[Any] = [{"role": "user", "content": "x"}]


class Pair(pydantic.BaseModel):
    left: bool
    right: int = pydantic.Field(ge=0, le=99)


@pytest.fixture(scope="module")
def client(byte_llama: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    with Pipeline.open(byte_llama(), slots=4) as pipeline:
        http = TestClient(create_app({"bytes": pipeline}))
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="bytes", messages=CHAT, response_format=Pair, n=3, temperature=1.5)
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Pair)
        assert choice.finish_reason == "stop"


def test_a_json_object_comes_in_pieces(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 3}
    named: Any = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema, "strict": True}}
    chunks = list(client.chat.completions.create(model="bytes", messages=CHAT, response_format=named, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), schema)
    assert chunks[-1].choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(
        model="bytes", messages=CHAT, response_format={"type": "json_object"}, max_tokens=6
    )
    assert str(cut.choices[0].message.content).startswith("{")


@pytest.mark.parametrize(
    ("outputs", "texts"),
    [
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"regex": "[ab]"}, {"a", "b"}),
        ({"grammar": 'start: "u" | "v"'}, {"u", "v"}),
        ({"json": {"const": 5}}, {"5"}),
        ({"json": '{"const": 5}'}, {"5"}),
    ],
)
def test_vllms_structured_outputs(client: openai.OpenAI, outputs: Any, texts: set[str]) -> None:
    extra = {"structured_outputs": outputs}
    answer = client.completions.create(model="bytes", prompt="x", extra_body=extra, temperature=1.5, n=4)
    assert {choice.text for choice in answer.choices} <= texts


def test_an_impossible_structure_is_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the json_schema cannot be followed: Invalid type: nonsense"):
        client.completions.create(
            model="bytes", prompt="x", extra_body={"structured_outputs": {"json": {"type": "nonsense"}}}
        )


def test_a_structure_too_complex_to_go_on_with_is_400(client: openai.OpenAI) -> None:
    """It compiles, and the limit is met only while the text is made."""
    with pytest.raises(openai.BadRequestError, match="the structure cannot be followed beyond token"):
        client.completions.create(
            model="bytes", prompt="x", extra_body={"structured_outputs": {"regex": "(x{1000}){1000}"}}
        )


def test_responses_are_parsed(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="bytes", input="x", text_format=Pair, temperature=1.5)
    assert isinstance(answer.output_parsed, Pair)
    assert answer.status == "completed"
    format_: Any = {"type": "json_schema", "name": "yes", "schema": {"enum": ["yes", "no"]}, "strict": True}
    with client.responses.stream(model="bytes", input="x", text={"format": format_}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert json.loads(text) in ("yes", "no")
        assert stream.get_final_response().output_text == text

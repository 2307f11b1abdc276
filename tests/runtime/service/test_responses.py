"""/v1/responses, by OpenAI's own client and as bytes; what it gets is compared with what the pipeline says."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import openai
import pytest

INPUT = "cat sat on"


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(service: Any) -> Callable[..., Any]:
    """What the pipeline itself makes of messages (role, content)."""
    pipeline = service.pipelines["llama"]

    def complete(*messages: tuple[str, str], **sampling: Any) -> Any:
        given = [{"role": role, "content": content} for role, content in messages]
        return pipeline.generate(pipeline.chat_prompt(given), **sampling).result(60)

    return complete


def test_a_response_is_what_the_pipeline_says(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    want = direct(("user", INPUT), max_tokens=12, min_tokens=12)
    answer = client.responses.create(
        model="llama",
        input=INPUT,
        temperature=0,
        max_output_tokens=12,
        metadata={"a": "b"},
        extra_body={"min_tokens": 12},
    )
    assert answer.output_text == want.text
    assert (answer.status, answer.model, answer.metadata) == ("incomplete", "llama", {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (item,) = answer.output
    assert (item.type, item.status) == ("message", "incomplete")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (want.prompt_tokens, 12)
    assert answer.usage.total_tokens == want.prompt_tokens + 12


def test_a_response_that_ends_by_itself_is_complete(
    client: openai.OpenAI, service: Any, direct: Callable[..., Any]
) -> None:
    (end,) = service.pipelines["llama"].bundle.manifest.generation_defaults.end_ids
    more = {"logit_bias": {str(end): 100}}
    answer = client.responses.create(model="llama", input=INPUT, extra_body=more)
    assert (answer.status, answer.incomplete_details, answer.output_text) == ("completed", None, "")


def test_the_history_may_have_all_forms_of_messages(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    """A second turn, with the first answer sent back as it came."""
    first = client.responses.create(model="llama", input=INPUT, temperature=0, max_output_tokens=4)
    turns: list[Any] = [
        {"role": "user", "content": INPUT},
        *[item.model_dump(exclude_unset=True) for item in first.output],
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("ran", "on")]},
    ]
    before = [("system", "dog"), ("user", INPUT), ("assistant", first.output_text)]
    want = direct(*before, ("user", "ran\non"), max_tokens=6)
    answer = client.responses.create(
        model="llama", instructions="dog", input=turns, temperature=0, max_output_tokens=6, store=True
    )
    assert answer.output_text == want.text
    assert answer.instructions == "dog"
    assert answer.model_dump()["store"] is False  # whatever was asked: nothing is


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_has_all_events_in_order(client: openai.OpenAI, direct: Callable[..., Any], logprobs: bool) -> None:
    want = direct(("user", INPUT), max_tokens=8, logprobs=2)
    include: Any = ["message.output_text.logprobs"] if logprobs else []
    common: Any = {"model": "llama", "input": INPUT, "temperature": 0, "max_output_tokens": 8, "include": include}
    events = list(client.responses.create(**common, stream=True, top_logprobs=2 if logprobs else 0))
    status = "incomplete" if want.choices[0].finish_reason == "length" else "completed"
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{status}",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces: list[Any] = events[4 : 4 + deltas]
    done, part, item, last = (event.model_dump() for event in events[-4:])
    assert "".join(piece.delta for piece in pieces) == done["text"] == want.text
    assert part["part"]["text"] == item["item"]["content"][0]["text"] == want.text
    response = last["response"]
    assert response["output"] == [item["item"]]
    assert response["id"] == events[0].model_dump()["response"]["id"]
    assert {piece.item_id for piece in pieces} == {item["item"]["id"]}
    assert response["usage"]["output_tokens"] == want.completion_tokens
    found = [one for piece in pieces for one in piece.logprobs]
    assert len(found) == (want.completion_tokens if logprobs else 0)
    if logprobs:
        expected = [token.logprob for token in want.choices[0].logprobs]
        np.testing.assert_allclose([one.logprob for one in found], expected, atol=1e-4)
        assert {len(one.top_logprobs or ()) for one in found} == {2}
        whole = client.responses.create(**common, top_logprobs=2).model_dump()["output"][0]["content"][0]["logprobs"]
        assert [one["token"] for one in whole] == [one.token for one in found]


def test_events_have_names_and_no_done_follows(service: Any) -> None:
    with service.stream("responses", model="llama", input=INPUT, max_output_tokens=3) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).removesuffix("\n\n").split("\n\n")
    for event in events:
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_what_fails_in_a_stream_is_its_last_event(service: Any, client: openai.OpenAI) -> None:
    steps = 0

    def fails_later(stage: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("worn out")

    common: Any = {"model": "llama", "input": INPUT, "extra_body": {"min_tokens": 100}}
    try:
        service.faults.step = fails_later
        *_, last = client.responses.create(**common, stream=True)
        assert last.type == "response.failed"
        assert last.response.status == "failed"
        assert last.response.error is not None
        assert "worn out" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="worn out"):
            client.responses.create(**common, stream=True)
    finally:
        service.faults.step = lambda stage, inputs, outputs: None


def test_a_client_that_leaves_a_stream_frees_its_slot(service: Any) -> None:
    with service.stream("responses", model="llama", input=INPUT, min_tokens=200) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while service.metric('stageline_num_requests_running{model="llama"}'):
        assert time.monotonic() < deadline


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input: list should have at least 1 item"),
    ({"input": 5}, "input: input should be a valid list"),
    ({"input": None}, "input is missing"),
    ({"input": "cat " * 300}, "takes at most 256"),
    ({"input": [5]}, "input.0: "),
    ({"input": [{"role": "user"}]}, "input.0.content is missing"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
    (
        {"input": [{"type": "web_search_call"}]},
        "input.0: items of this type are not supported; send messages, function",
    ),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments is missing"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input.0.output"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text is missing"),
    ({"input": "a\ud800"}, "not valid Unicode"),
    ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search' are not supported; send functions"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.function.name: string should match pattern"),
    ({"tools": [{"type": "function", "name": "f"}] * 2}, "two tools have the name 'f'"),
    ({"tools": [{"type": "function", "name": "f"}]}, "chat template"),
    ({"tool_choice": "required"}, "tool_choice is 'required', and the tools are none"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice is 'f', and the tools are none"),
    ({"max_tool_calls": 2}, "leave max_tool_calls out"),
    ({"previous_response_id": "resp_1"}, "no responses are stored here; send the messages before in input"),
    ({"conversation": "conv_1"}, "no conversations are stored here"),
    ({"background": True}, "no responses are stored here"),
    ({"prompt": {"id": "p"}}, "no prompts are stored here"),
    ({"truncation": "auto"}, "nothing is left out"),
    ({"reasoning": {"effort": "high"}}, "unknown or unsupported parameter 'reasoning'"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format: give a schema"),
    ({"text": {"format": {"type": "json_object"}}}, "this model's tokenizer cannot follow a structure"),
    ({"response_format": {"type": "json_object"}}, "send text.format"),
    ({"max_tokens": 5}, "send max_output_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens: input should be greater than or equal to 1"),
    ({"max_output_tokens": 10**30}, "max_output_tokens: input should be less than"),
    ({"temperature": -1}, "temperature is -1.0"),
    ({"top_logprobs": 99}, "logprobs is 99"),
    ({"n": 2}, "n: input should be 1"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"tempreature": 1}, "unknown or unsupported parameter 'tempreature'; known: model, "),
    ({"model": "bert"}, "embeds; send requests to /v1/embeddings"),
    ({"model": "nope"}, "there is no model 'nope'"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=[json.dumps(body)[:40] for body, _ in WRONG])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_refused_in_one_line(service: Any, body: dict[str, Any], message: str, stream: bool) -> None:
    content = json.dumps({"model": "llama", "input": "a", "stream": stream, **body})
    headers = {"content-type": "application/json"}
    answer = service.client.post("/v1/responses", content=content, headers=headers)
    assert answer.status_code == (404 if body.get("model") == "nope" else 400), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_what_changes_nothing_is_accepted(service: Any) -> None:
    for more in (
        {"store": False, "user": "me", "tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"truncation": "disabled", "background": False, "reasoning": {"effort": None, "summary": None}},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "include": ["reasoning.encrypted_content"]},
        {"previous_response_id": None, "instructions": None, "service_tier": "auto", "top_logprobs": 0},
        {"stream_options": {"include_obfuscation": False}, "ignore_eos": True, "stop": None},
    ):
        answer = service.post("responses", model="llama", input="a", max_output_tokens=1, **more)
        assert answer.status_code == 200, (more, answer.text)

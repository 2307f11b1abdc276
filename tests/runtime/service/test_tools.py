"""OpenAI's own client gives tools to a model and reads its calls and its reasoning."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.sampling import Row
from stageline.runtime.generation.text_model import open_encoder
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app
from starlette.testclient import TestClient

CHAT: list[Any] = [{"role": "user", "content": "x"}]
SHOWS = "{% for m in messages %}{{ m.content }}{% endfor %}"
HERMES = f"{{% if tools %}}<tool_call>{{% endif %}}{SHOWS}"
MISTRAL = f"{{% if tools %}}[TOOL_CALLS]{{% endif %}}{SHOWS}"
LLAMA = f"{{% if tools %}}<|python_tag|>{{% endif %}}{SHOWS}"
THINKS = f"{{% if tools %}}<tool_call>{{% endif %}}{SHOWS}{{% if think %}}<think>\n{{% endif %}}"
THOUGHTS = {"<think>": False, "</think>": False}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"enum": ["A", "B"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "now", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "strict": True}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "A", "days": 1}}\n</tool_call>'


class Weather(pydantic.BaseModel):
    days: int = pydantic.Field(ge=0, le=9)


@contextmanager
def served(bundle: Path) -> Iterator[openai.OpenAI]:
    with Pipeline.open(bundle, slots=4) as pipeline:
        http = TestClient(create_app({"m": pipeline}))
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def hermes(byte_llama: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    with served(byte_llama(HERMES)) as client:
        yield client


@pytest.fixture(scope="module")
def thinks(byte_llama: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    with served(byte_llama(THINKS, THOUGHTS)) as client:
        yield client


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, byte_llama: Callable[..., Path]) -> Callable[..., None]:
    """Makes the model write a text, whatever it computes; `template`, `tokens`: of its bundle."""

    def script(text: str, template: str = HERMES, tokens: Any = None) -> None:
        encoder = open_encoder(Bundle.open(byte_llama(template, tokens)))
        assert encoder is not None
        ids = [*encoder.ids(text, special=False), 1]
        monkeypatch.setattr(Row, "choose", lambda row, logits: ids[row.drawn])

    return script


def joined(stream: Any) -> tuple[dict[str, Any], str, int]:
    """The message that chunks make, why it ended, and in how many chunks the arguments came."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    pieces = 0
    for chunk in stream:
        (choice,) = chunk.choices
        message["content"] += choice.delta.content or ""
        message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
        for delta in choice.delta.tool_calls or ():
            calls = message["tool_calls"]
            if delta.id is not None:
                assert delta.index == len(calls)
                assert delta.type == "function"
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments
            pieces += bool(delta.function.arguments)
        finish = choice.finish_reason
    return message, finish, pieces


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_from_what_the_model_writes(hermes: openai.OpenAI, says: Any, stream: bool) -> None:
    says(f'Well. {CALL}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>')
    answer: Any = hermes.chat.completions.create(model="m", messages=CHAT, tools=TOOLS, stream=stream)
    if stream:
        message, finish, pieces = joined(answer)
        assert pieces > 10
        calls, content = message["tool_calls"], message["content"]
    else:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        content = message.content
        calls = [{"id": c.id, "name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls]
    assert (content, finish) == ("Well.", "tool_calls")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
        ("weather", {"place": "A", "days": 1}), ("time", {}),
    ]  # fmt: skip
    assert len({c["id"] for c in calls}) == 2
    assert all(c["id"].startswith("call_") for c in calls)


def test_one_call_at_a_time_where_that_is_asked_for(hermes: openai.OpenAI, says: Any) -> None:
    says(f"{CALL}\n{CALL}")
    answer = hermes.chat.completions.create(model="m", messages=CHAT, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or ()) == 1
    assert answer.choices[0].message.content is None


def test_no_tools_are_called_where_none_may_be(hermes: openai.OpenAI, says: Any) -> None:
    says(CALL)
    usage = []
    for more in ({"tool_choice": "none"}, {}):
        answer = hermes.chat.completions.create(model="m", messages=CHAT, tools=TOOLS, **more)
        usage.append(answer.usage.prompt_tokens)
        assert (answer.choices[0].message.content == CALL) == bool(more)
    assert usage[1] - usage[0] == len("<tool_call>")  # the template is not given the tools


def test_a_call_that_is_cut_off_ends_with_length(hermes: openai.OpenAI, says: Any) -> None:
    says(CALL)
    for tokens, content, called in ((20, CALL[:20], False), (60, None, True)):
        common: Any = {"model": "m", "messages": CHAT, "tools": TOOLS, "max_tokens": tokens}
        whole = hermes.chat.completions.create(**common)
        message, finish, _ = joined(hermes.chat.completions.create(**common, stream=True))
        assert whole.choices[0].finish_reason == finish == "length"
        assert whole.choices[0].message.content == content
        assert (message["content"] or None) == content
        assert bool(whole.choices[0].message.tool_calls) == called


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_comes_and_fits_its_schema(hermes: openai.OpenAI, choice: Any) -> None:
    """The weights are random."""
    common: Any = {"model": "m", "messages": CHAT, "tools": TOOLS, "tool_choice": choice, "temperature": 1.5, "seed": 1}
    names = set()
    answer = hermes.chat.completions.create(**common, n=6, parallel_tool_calls=False)
    message, finish, _ = joined(hermes.chat.completions.create(**common, parallel_tool_calls=False, stream=True))
    calls = [(c["name"], c["arguments"]) for c in message["tool_calls"]]
    for one in answer.choices:
        assert (one.finish_reason, one.message.content, finish, message["content"]) == ("tool_calls", None, finish, "")
        (call,) = one.message.tool_calls or ()
        assert call.type == "function"
        calls.append((call.function.name, call.function.arguments))
    for name, arguments in calls:
        names.add(name)
        jsonschema.validate(json.loads(arguments), PARAMETERS if name == "weather" else {"maxProperties": 0})
    assert len(calls) == 7
    assert names <= ({"weather", "time"} if choice == "required" else {"weather"})


def test_a_pydantic_tool_is_parsed(hermes: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    answer = hermes.chat.completions.parse(
        model="m", messages=CHAT, tools=tools, tool_choice="required", parallel_tool_calls=False, n=2, seed=1
    )
    for choice in answer.choices:
        (call,) = choice.message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)


def test_the_history_has_calls_and_their_results(hermes: openai.OpenAI, says: Any) -> None:
    says("Fine.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "A"}'}}
    history: list[Any] = [
        *CHAT, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]  # fmt: skip
    answer = hermes.chat.completions.create(model="m", messages=history, tools=TOOLS)
    assert answer.choices[0].message.content == "Fine."
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<tool_call>x" + "sunny")


def test_an_answer_of_a_schema_or_a_call(hermes: openai.OpenAI) -> None:
    """What agents ask for whose last answer has a type. The weights are random."""
    answer = hermes.chat.completions.create(
        model="m", messages=CHAT, tools=TOOLS, parallel_tool_calls=False, n=12, temperature=2, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "yes", "schema": {"enum": [1, 2]}}},
    )  # fmt: skip
    kinds = set()
    for choice in answer.choices:
        kinds.add(choice.finish_reason)
        assert choice.message.content in ("1", "2") if choice.finish_reason == "stop" else choice.message.tool_calls
    assert kinds == {"stop", "tool_calls"}
    with pytest.raises(openai.BadRequestError, match="tool_choice and a structure of the answer exclude each other"):
        hermes.chat.completions.create(
            model="m", messages=CHAT, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"}
        )


WEATHER = {
    "name": "get_weather", "description": "get_weather(city: str) -> str\nGet the weather",
    "parameters": {"properties": {"city": {"title": "City", "type": "string"}}, "required": ["city"], "type": "object"},
}  # fmt: skip
CITY = {
    "name": "City", "description": "A city",
    "parameters": {"properties": {"name": {"maxLength": 20, "type": "string"}}, "required": ["name"], "type": "object"},
}  # fmt: skip
CALLED = {
    "id": "call_6c5ab44e",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{\n "city": "a"\n}'},
}


def tool(function: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**function, **more}}


# As these clients have sent them (models, texts and schemas shortened).
BODIES: dict[str, dict[str, Any]] = {
    "langchain bind_tools": {
        "messages": [{"content": "x", "role": "user"}], "max_completion_tokens": 9, "stream": False, "temperature": 0.0,
        "tools": [tool(WEATHER)],
    },
    "langchain tool_choice any": {
        "messages": [{"content": "x", "role": "user"}], "max_completion_tokens": 99, "parallel_tool_calls": False,
        "stream": True, "temperature": 0.0, "tool_choice": "required", "tools": [tool(WEATHER)],
    },
    "langchain strict": {
        "messages": [{"content": "x", "role": "user"}], "max_completion_tokens": 99, "stream": False,
        "temperature": 0.0, "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "tools": [tool(WEATHER, strict=True)],
    },
    "langchain with_structured_output": {
        "messages": [{"content": "x", "role": "user"}], "max_completion_tokens": 99, "parallel_tool_calls": False,
        "stream": False, "temperature": 0.0, "tool_choice": {"type": "function", "function": {"name": "City"}},
        "tools": [tool(CITY)],
    },
    "langchain tool message": {
        "messages": [{"content": "x", "role": "user"}, {"content": None, "role": "assistant", "tool_calls": [CALLED]},
                     {"content": "sunny", "role": "tool", "tool_call_id": "call_6c5ab44e"}],
        "max_completion_tokens": 9, "stream": False, "temperature": 0.0, "tools": [tool(WEATHER)],
    },
    "llamaindex": {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                     {"role": "tool", "content": "sunny", "tool_call_id": "call_6c5ab44e"}],
        "max_tokens": 9, "parallel_tool_calls": False, "stream": False, "temperature": 0.0, "tool_choice": "auto",
        "tools": [tool(WEATHER, strict=False)],
    },
    "llamaindex structured": {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 99, "parallel_tool_calls": False, "stream": False,
        "temperature": 0.0, "tool_choice": "required", "tools": [tool(CITY, strict=False)],
    },
    "litellm": {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALLED]},
                     {"role": "tool", "tool_call_id": "call_6c5ab44e", "name": "get_weather", "content": "sunny"}],
        "temperature": 0, "max_tokens": 9, "tools": [tool(WEATHER)], "tool_choice": "required", "stream": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES)
def test_what_clients_send_is_answered(hermes: openai.OpenAI, client: str) -> None:
    body = BODIES[client]
    answer = hermes.post("/chat/completions", body={"model": "m", **body}, cast_to=httpx.Response)
    assert answer.status_code == 200
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"tool_calls":[{"index":0,' in answer.text or body["max_tokens"] < 20
    elif body.get("tool_choice", "auto") != "auto":
        assert answer.json()["choices"][0]["message"]["tool_calls"]


@pytest.mark.parametrize(
    ("template", "tokens", "text", "length"),
    [
        (MISTRAL, {"[TOOL_CALLS]": True}, '[TOOL_CALLS] [{"name": "time", "arguments": {}}]', 9),
        (LLAMA, {"<|python_tag|>": True}, '<|python_tag|>{"name": "time", "parameters": {}}', 29),
        (LLAMA, {}, '{"name": "time", "parameters": {}}', 29),
        (HERMES, {"<tool_call>": True, "</tool_call>": True}, CALL.replace("weather", "time"), 29),
    ],
)
def test_marks_of_other_formats_may_be_special_tokens(
    byte_llama: Callable[..., Path], says: Any, template: str, tokens: Any, text: str, length: int
) -> None:
    """Their text is left out elsewhere. Mistral's templates want ids of nine characters."""
    common: Any = {"model": "m", "messages": CHAT, "tools": TOOLS}
    with served(byte_llama(template, tokens)) as client:
        for scripted in (False, True):
            if scripted:
                says(text, template, tokens)
                common["logprobs"] = True
            else:
                common |= {"tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
            answer = client.chat.completions.create(**common)
            (call, *_) = answer.choices[0].message.tool_calls or ()
            message, finish, _ = joined(client.chat.completions.create(**common, stream=True))
            names = {call.function.name, message["tool_calls"][0]["name"]}
            assert (len(call.id), finish) == (length, "tool_calls")
            assert names <= ({"time"} if scripted else {"time", "weather"})
            common["tool_choice"] = "auto"


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("text", ["hm {\n</think>\n\nYes.", f"hm\n</think>\n\n{CALL}", "hm"])
def test_reasoning_comes_apart(thinks: openai.OpenAI, says: Any, begun: bool, text: str) -> None:
    says(text if begun else f"<think>\n{text}", THINKS, THOUGHTS)
    common: Any = {"model": "m", "messages": CHAT, "tools": TOOLS}
    common["extra_body"] = {"chat_template_kwargs": {"think": begun}}
    message, finish, _ = joined(thinks.chat.completions.create(**common, stream=True))
    whole: Any = thinks.chat.completions.create(**common).choices[0]
    thought, _, rest = text.partition("\n</think>\n\n")
    assert whole.message.reasoning_content == message["reasoning_content"] == thought
    assert (whole.message.content or "") == message["content"] == ("" if rest == CALL else rest)
    assert whole.finish_reason == finish == ("tool_calls" if rest == CALL else "stop")


def test_reasoning_is_continued(thinks: openai.OpenAI, says: Any) -> None:
    says(" so.</think>Yes.", THINKS, THOUGHTS)
    for begun, thought in (("<think>hm", "so."), ("<think>hm</think>Yes", None)):
        more: Any = {"continue_final_message": True, "add_generation_prompt": False}
        messages: Any = [*CHAT, {"role": "assistant", "content": begun}]
        answer: Any = thinks.chat.completions.create(model="m", messages=messages, extra_body=more)
        assert answer.choices[0].message.reasoning_content == thought


@pytest.mark.parametrize("begun", [True, False])
def test_a_structure_begins_after_the_reasoning(thinks: openai.OpenAI, begun: bool) -> None:
    """The weights are random; a bias ends the reasoning soon, and begins it where it need not come."""
    asked: Any = {"prompt": "<think></think>"}
    tokens: Any = thinks.post("http://testserver/tokenize", body=asked, cast_to=object)
    think, thought = tokens["tokens"]
    extra: Any = {"chat_template_kwargs": {"think": begun}}
    bias = {str(thought): 4, str(think): 4}
    common: Any = {"model": "m", "messages": CHAT, "temperature": 1.5, "n": 6, "seed": 1, "extra_body": extra}
    common["logit_bias"] = bias
    schema = {"name": "yes", "schema": {"enum": ["yes", "no"]}}
    thoughts = 0
    for more in (
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    ):
        for choice in thinks.chat.completions.create(**common, **more).choices:
            thoughts += bool(choice.message.reasoning_content)  # type: ignore[attr-defined]
            if choice.finish_reason == "length":
                assert begun or choice.message.reasoning_content  # type: ignore[attr-defined]
                assert not choice.message.content
            elif "tools" in more:
                assert len(choice.message.tool_calls or ()) == 1
            else:
                assert choice.message.content in ('"yes"', '"no"')
    assert thoughts


FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]


def items(response: Any) -> list[Any]:
    """The items of a response: kind, text or name with arguments, and status."""
    found: list[Any] = []
    for item in response.output:
        said = (item.name, json.loads(item.arguments)) if item.type == "function_call" else item.content[0].text
        found.append((item.type, said, item.status))
    return found


def streamed(client: openai.OpenAI, **asked: Any) -> Any:
    """The response of a stream, put together by the client, and as its last event has it."""
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last: Any = events[-1]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert [item.id for item in done] == [item.id for item in last.response.output]
        final = stream.get_final_response()
    assert items(final) == items(last.response)
    return final


def test_responses_have_calls(hermes: openai.OpenAI, says: Any) -> None:
    says(f'Well. {CALL}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>')
    asked: Any = {"model": "m", "input": CHAT, "tools": FLAT}
    want = [
        ("message", "Well.", "completed"),
        ("function_call", ("weather", {"place": "A", "days": 1}), "completed"),
        ("function_call", ("time", {}), "completed"),
    ]
    whole = hermes.responses.create(**asked)
    assert items(whole) == items(streamed(hermes, **asked)) == want
    assert [tool.model_dump()["name"] for tool in whole.tools] == ["weather", "time"]
    calls: list[Any] = [item for item in whole.output if item.type == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    sent_back: Any = [*CHAT, *(item.model_dump(exclude_unset=True) for item in whole.output), *outputs]
    says("Fine.")
    answer = hermes.responses.create(model="m", input=sent_back, tools=FLAT)
    assert answer.output_text == "Fine."
    assert answer.usage is not None
    assert answer.usage.input_tokens == len("<tool_call>x" + "Well." + "sunny" * 2)


def test_a_response_without_text_has_an_empty_message_and_a_cut_call_is_incomplete(
    hermes: openai.OpenAI, says: Any
) -> None:
    says("")
    assert items(hermes.responses.create(model="m", input=CHAT, tools=FLAT)) == [("message", "", "completed")]
    says(CALL)
    cut = hermes.responses.create(model="m", input=CHAT, tools=FLAT, max_output_tokens=60)
    assert [(item.type, item.status) for item in cut.output] == [("function_call", "incomplete")]  # type: ignore[union-attr]
    assert cut.status == "incomplete"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_demanded_call_of_a_response_fits_its_schema(hermes: openai.OpenAI, choice: Any) -> None:
    """The weights are random."""
    asked: Any = {"model": "m", "input": CHAT, "tools": FLAT, "tool_choice": choice, "parallel_tool_calls": False}
    for answer in (hermes.responses.create(**asked), streamed(hermes, **asked, temperature=1.5)):
        (call,) = answer.output
        assert call.type == "function_call"
        jsonschema.validate(json.loads(call.arguments), PARAMETERS if call.name == "weather" else {"maxProperties": 0})
        assert call.name == "weather" or choice == "required"


def test_the_reasoning_of_a_response_is_an_item(thinks: openai.OpenAI, says: Any) -> None:
    says(f"<think>\nhm\n</think>\n\n{CALL}", THINKS, THOUGHTS)
    asked: Any = {"model": "m", "input": CHAT, "tools": FLAT, "top_logprobs": 1}
    want = [("reasoning", "hm", "completed"), ("function_call", ("weather", {"place": "A", "days": 1}), "completed")]
    whole = thinks.responses.create(**asked)
    assert items(whole) == items(streamed(thinks, **asked)) == want
    says("Yes.", THINKS, THOUGHTS)
    back: Any = [*CHAT, *(item.model_dump(exclude_unset=True) for item in whole.output)]
    assert thinks.responses.create(model="m", input=back, tools=FLAT).output_text == "Yes."

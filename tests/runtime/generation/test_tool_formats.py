"""Which way of calling tools a chat template has, prompts with tools as transformers renders them, and grammars."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from stageline.models.errors import RequestError
from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.answer import AnswerReader
from stageline.runtime.generation.chat_template import ChatTemplate
from stageline.runtime.generation.grammars import Grammars
from stageline.runtime.generation.structure import MAX_BYTES, Structure
from stageline.runtime.generation.tool_formats import (
    HERMES,
    JSON,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    ToolFormat,
    calls,
    tool_format,
)
from stageline.runtime.service.schema import ChatRequest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# In the manner of Qwen2.5's, Llama 3.1's and Mistral 7B v0.3's.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nAnswer with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA31 = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' and loop.first and tools is not none %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions, called as ' }}
        {{- '{"name": function name, "parameters": dictionary}.\\n\\n' }}
        {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL7 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.function.items() if key != 'return' %}
                    {{- '"' + key + '": ' }}
                    {%- if value is string %}{{- '"' + value + '"' }}{%- else %}{{- value | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('ids have a length of 9') }}
            {%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""

TEMPLATES = {"qwen": QWEN, "llama": LLAMA31, "mistral": MISTRAL7}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "description": "The weather <now>",  # before the name: the order is the client's
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": {"enum": ["today", "é"]}}},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}


def call(number: int, name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("several", [False, True])
def test_prompts_with_tools_are_those_of_transformers(tmp_path: Path, kind: str, several: bool) -> None:
    """As OpenAI's clients send them, arguments as JSON; transformers is given what its documentation says, objects."""
    made = [call(1, "get_weather", '{"city": "Zürich", "day": "é"}'), call(2, "get_time", "{}")][: 1 + several]
    history = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": made},
        *({"role": "tool", "tool_call_id": one["id"], "content": '{"t": 5}'} for one in made),
        {"role": "user", "content": "And now?"},
    ]
    body = ChatRequest.model_validate({"model": "m", "messages": history, "tools": [WEATHER, TIME]})
    reference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), bos_token="<s>", eos_token="</s>"
    )
    reference.chat_template = TEMPLATES[kind]
    reference.save_pretrained(tmp_path)
    parsed = [
        {**m, "tool_calls": [{**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
                             for c in m["tool_calls"]]}
        if "tool_calls" in m else m
        for m in history
    ]  # fmt: skip
    for message in parsed:
        if message["content"] is None:
            del message["content"]
    with ChatTemplate.open(tmp_path) as template:
        messages = [message.for_template for message in body.messages]
        if kind == "llama" and several:
            with pytest.raises(RequestError, match="one call at a time"):
                template.render(messages, **body.template_variables)
            return
        expected = reference.apply_chat_template(
            parsed, tools=[WEATHER, TIME], tokenize=False, add_generation_prompt=True
        )
        assert template.render(messages, **body.template_variables) == expected
        assert "get_weather" in expected


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        (LLAMA31, LLAMA),
        (MISTRAL7, replace(MISTRAL, opening="[TOOL_CALLS] [")),
        (MISTRAL7.replace("[TOOL_CALLS] [", "[TOOL_CALLS]["), MISTRAL),
        ("{% for t in tools %}{% endfor %}[TOOL_CALLS]name[ARGS]", MISTRAL_NAMED),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ("{%- if tools %}Answer in JSON.{% endif %}", JSON),
    ],
)
def test_a_template_shows_how_calls_are_written(template: str, form: ToolFormat) -> None:
    assert tool_format(template) == form


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages }} no tools", "this model's chat template has no tools; leave them out"),
        ("{% if tools %}<tool_call>\n<function=name>{% endif %}", "calls of tools in a way ('<function=') that is not"),
    ],
)
def test_a_template_that_cannot_have_tools_is_refused(template: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        tool_format(template)
    assert message in str(error.value)


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def encoder(special: bool = True) -> TextEncoder:
    """One token per byte, and those that mark calls."""
    names = ["<s>", "</s>", *BYTES]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(names[:2])
    marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return TextEncoder(made, 4096, 0)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "<tool_call>"]}},
}
TOOLS = [{"name": "get", "parameters": SCHEMA}, {"name": "get_more", "parameters": None}]


def drawn(structure: Structure, tokens: TextEncoder, seed: int) -> str:
    """A text that random logits give."""
    matcher = Grammars(tokens, tokens.size, [1]).matcher(structure).copy()
    random, ids = np.random.default_rng(seed), list[int]()
    while not matcher.complete and len(ids) < 3000:
        scores = matcher.masked(random.normal(size=tokens.size).astype(np.float32))
        best = int(scores.argmax())
        assert np.isfinite(scores[best]), matcher.error
        matcher.take(best)
        ids.append(best)
    assert matcher.complete
    return tokens.decode(ids[: -1 if ids[-1] == 1 else None], special=True)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, JSON])
def test_a_grammar_gives_calls_that_fit_their_schemas(form: ToolFormat, special: bool) -> None:
    tokens = encoder(special)
    counts = set()
    for several in (True, False):
        structure = calls(form, TOOLS, tokens, several, None)
        for seed in range(8):
            reader = AnswerReader(form, ["get", "get_more"])
            text = drawn(structure, tokens, seed)
            parts = [*reader.push(text), *reader.finish()]
            assert {part.kind for part in parts} == {"name", "arguments"}, text
            if several:
                counts.add(reader.calls)
            else:
                assert reader.calls == 1
            for number in range(reader.calls):
                of = [part for part in parts if part.call == number]
                arguments = json.loads("".join(part.text for part in of[1:]))
                jsonschema.validate(arguments, SCHEMA if of[0].text == "get" else {"maxProperties": 0})
    assert (max(counts) > 1) == (form.between is not None)


@pytest.mark.parametrize(
    "structure",
    [
        Structure.json_schema({"const": "<tool_call>"}),
        Structure.regex("<tool_call>"),
        Structure.choice(["<tool_call>"]),
        Structure.grammar('start: "<tool_call>"'),
        Structure.grammar('root ::= "<tool_call>"'),
    ],
)
def test_a_certain_text_may_spell_a_special_token(structure: Structure) -> None:
    assert drawn(structure, encoder(), 0).strip('"') == "<tool_call>"


def test_an_answer_of_a_structure_may_come_instead_of_a_call() -> None:
    tokens, answer = encoder(), Structure.json_schema({"const": "no"})
    texts = {drawn(calls(HERMES, TOOLS, tokens, False, answer), tokens, seed) for seed in range(12)}
    assert '"no"' in texts
    assert any(text.startswith("<tool_call>") for text in texts)
    with pytest.raises(RequestError, match="cannot both call tools and write an answer of a structure"):
        calls(LLAMA, TOOLS, tokens, False, answer)
    with pytest.raises(RequestError, match="cannot both call tools and write an answer of a structure"):
        calls(HERMES, TOOLS, tokens, False, Structure.regex("a"))


def test_arguments_have_no_properties_that_are_not_named() -> None:
    """Unless the schema says that they may."""
    inner = {"type": "object", "properties": {"properties": {"const": 1}}, "required": ["properties"]}
    schema: dict[str, Any] = {
        "properties": {"a": {"items": {"$ref": "#/$defs/I"}, "type": "array", "minItems": 1, "maxItems": 1}},
        "required": ["a"],
        "$defs": {"I": inner},
    }
    tokens = encoder()
    texts = [
        drawn(calls(LLAMA, [{"name": "f", "parameters": schema}], tokens, False, None), tokens, n) for n in range(4)
    ]
    assert all(json.loads(text)["parameters"] == {"a": [{"properties": 1}]} for text in texts)
    free = {"properties": {}, "additionalProperties": {"const": 2}, "minProperties": 1, "maxProperties": 1}
    text = drawn(calls(LLAMA, [{"name": "f", "parameters": free}], tokens, False, None), tokens, 0)
    assert list(json.loads(text)["parameters"].values()) == [2]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "array"}, "the parameters of the tool 'f' are no object"),
        ({"properties": {"a": {"type": "nonsense"}}}, "the tools cannot be followed: .*Invalid type: nonsense"),
        ({"properties": {"a": {"not": {}}}}, "the tools cannot be followed: .*not"),
        ({"properties": {f"a{n}": {} for n in range(1001)}}, "names 1001 properties"),
        ({"properties": {"a": {"description": "b" * (MAX_BYTES - 200)}}}, "the tools have more than 262144 bytes"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(parameters: Any, message: str) -> None:
    tokens = encoder()
    with pytest.raises(RequestError, match=message):
        Grammars(tokens, tokens.size, [1]).matcher(
            calls(HERMES, [{"name": "f", "parameters": parameters}], tokens, True, None)
        )

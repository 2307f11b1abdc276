"""Chat templates render as transformers renders them, and a hostile one ends in an error soon."""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.checkpoint import Checkpoint
from stageline.models.errors import BundleError, RequestError, StagelineError
from stageline.runtime.generation.chat_template import GIVEN_BYTES, ChatTemplate
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SMOLLM2 = Path("models/checkpoints/smollm2")

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}
{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}
{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

TOOLS = """{%- if tools is not none %}
    {{- '# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' + (tool | tojson(indent=4)) + '\n' }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=-1, parts=[]) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {%- if message.content is string %}
        {{- message.role ~ ': ' ~ message.content.split('</think>')[-1].lstrip('\n') }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part['text'] }}{% endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
    {% generation %}{{ eos_token }}{% endgeneration %}
{%- endfor %}
{{- ns.last }} {{ documents }} {{ enable_thinking | default('unset') }} {{ undefined_name }}"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "tools": TOOLS}
PLAIN = [
    {"role": "user", "content": " Hi, <you> & 'me'! "},
    {"role": "assistant", "content": "Hello.\n\nWhat now? 😀"},
    {"role": "user", "content": "Ünïcödé\t你好"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> in a città",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def folder_with(folder: Path, template: Any, **config: Any) -> Path:
    """A tokenizer's folder, with the template in tokenizer_config.json."""
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


@contextmanager
def template_of(source: str) -> Iterator[ChatTemplate]:
    with ChatTemplate(Path("bundle/chat_template.jinja"), {"default": source}, {}) as template:
        yield template


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [PLAIN, PLAIN[:1], WITH_SYSTEM])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(
    tmp_path: Path, name: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name])
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    with ChatTemplate.open(folder) as template:
        if name == "gemma" and messages is WITH_SYSTEM:
            with pytest.raises(
                RequestError, match=r"the chat template refuses these messages: System role not supported$"
            ):
                template.render(messages, add_generation_prompt)
            return
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert template.render(messages, add_generation_prompt) == expected


def test_tools_parts_and_variables_render_as_in_transformers(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Αθήνα", "days": 1.5}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "In words?"}, {"type": "image"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "<think>no</think>\n\nsunny"},
    ]
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    with ChatTemplate.open(folder) as template:
        for variables in ({}, {"enable_thinking": False}, {"documents": [{"title": "T"}], "eos_token": "<other>"}):
            expected = reference.apply_chat_template(
                messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True, **variables
            )
            assert template.render(messages, tools=[WEATHER], **variables) == expected


@pytest.mark.checkpoints
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the reference checkpoint: stageline models fetch smollm2")
def test_smollm2_renders_as_in_transformers(tmp_path: Path) -> None:
    from stageline.exporter.gguf.tokenizer import save_tokenizer

    save_tokenizer(Checkpoint.open(SMOLLM2), tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    with ChatTemplate.open(tmp_path) as template:
        for messages in (PLAIN, WITH_SYSTEM):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert template.render(messages) == expected
        assert template.render(PLAIN).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    with template_of("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}") as template:
        yield template


@settings(deadline=None)
@given(content=st.text(), role=st.text(min_size=1))
def test_any_text_comes_through_as_it_is(chatml: ChatTemplate, content: str, role: str) -> None:
    assert chatml.render([{"role": role, "content": content}]) == f"[{role}]{content}"


def test_the_date_is_todays() -> None:
    with template_of("{{ strftime_now('%d %b %Y') }}") as template:
        before = datetime.now()
        rendered = template.render(PLAIN)
        assert rendered in {moment.strftime("%d %b %Y") for moment in (before, datetime.now())}


def test_a_template_file_goes_before_the_configs(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "config")
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    with ChatTemplate.open(folder) as template:
        assert template.render(PLAIN) == "config"
    (folder / "chat_template.jinja").write_text("file {{ bos_token }}{{ eos_token }}")
    with ChatTemplate.open(folder) as template:
        assert template.render(PLAIN) == "file <s></s>"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with ChatTemplate.open(folder) as template:
        assert template.render(PLAIN) == "json"


def test_special_tokens_may_stand_in_their_own_file(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "{{ bos_token }}{{ unk_token }}", unk_token=None)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<old>", "unk_token": {"content": "<unk>"}}')
    with ChatTemplate.open(folder) as template:
        assert template.render(PLAIN) == "<s><unk>"


def test_of_named_templates_tools_take_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = folder_with(tmp_path, named)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    with ChatTemplate.open(folder) as template:
        for tools in (None, [WEATHER]):
            rendered = template.render(PLAIN, tools=tools)
            assert rendered == reference.apply_chat_template(PLAIN, tools=tools, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template, so its model takes no messages; give a plain prompt$"),
        (3, r"tokenizer_config.json has a chat_template that is neither a text nor a list of named ones"),
        ([{"name": "default"}], r"neither a text nor a list of named ones"),
        ([{"name": "rag", "template": ""}], r"has chat templates for rag but no default one; give a plain prompt"),
        ("{% if %}", r"tokenizer_config.json cannot be used \(line 1: Expected an expression, got 'end of statement"),
        ("{{ 'a' | no_filter }}", r"cannot be used \(line 1: No filter named 'no_filter'.\); give a plain prompt"),
    ],
)
def test_a_bundle_without_a_usable_template_is_reported_what_to_do(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        ChatTemplate.open(folder_with(tmp_path, template))


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("chat_template.jinja", b"\xff"), ("chat_template.json", b"[]")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        ChatTemplate.open(tmp_path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages; give at least one"),
        ("Hi", "messages is a str; give a list of messages"),
        ({"role": "user", "content": "Hi"}, "messages is a dict; give a list of messages"),
        (None, "messages is a NoneType"),
        (["Hi"], "message 0 is a str; give a dict with a role and a content"),
        ([*PLAIN, {"content": "Hi"}], "message 3 has the role None; give user, assistant or system"),
        ([{"role": 3, "content": "Hi"}], "message 0 has the role 3"),
        ([{"role": "", "content": "Hi"}], "message 0 has the role ''"),
        ([{"role": "user"}], "message 0 has no content; give a text"),
        ([{"role": "user", "content": None}], "message 0 has no content; give a text"),
        ([{"role": "user", "content": 3}], "the content of message 0 is a int; give a text, or a list of parts"),
        ([{"role": "user", "content": ["Hi"]}], "the content of message 0 is a list"),
        ([{"role": "user", "content": "Hi", "at": object()}], "the chat is not JSON"),
        ([{"role": "user", "content": "a" * GIVEN_BYTES}], r"the chat has \d+ bytes as JSON, at most 16777216 fit"),
    ],
)
def test_what_is_no_chat_is_refused(chatml: ChatTemplate, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chatml.render(messages)
    assert chatml.render(PLAIN[:1])


@pytest.mark.parametrize("tools", ["weather", [print], {"type": "function"}])
def test_tools_that_are_no_schemas_are_refused(chatml: ChatTemplate, tools: Any) -> None:
    with pytest.raises(RequestError, match="tools is not a list of dicts; give the JSON schema of each function"):
        chatml.render(PLAIN, tools=tools)


def test_messages_that_a_template_fails_on_are_the_requests_fault() -> None:
    with template_of("{{ 'user: ' + messages[0]['content'] }}") as template:
        with pytest.raises(RequestError, match=r"cannot take these messages \(TypeError: can only concatenate str"):
            template.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
        assert template.render([{"role": "user", "content": "Hi"}]) == "user: Hi"


def test_what_a_template_raises_comes_in_one_line() -> None:
    with template_of("{{ raise_exception('a\nb ' + 'c' * 1000) }}") as template:
        with pytest.raises(RequestError) as raised:
            template.render(PLAIN)
        assert str(raised.value) == "the chat template refuses these messages: a b " + "c" * 295 + "…"


MEMORY = "it takes more than 536870912 bytes of memory"
CPU = "it takes more than 2 s of CPU time"
DEEP = "it is nested, or calls itself, too deeply"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception.__globals__.sys }}", "access to attribute '__globals__' of 'function' object is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe|not safely callable"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "access to attribute '__class__' of 'int' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", MEMORY),
        ("{{ ([0] * 10 ** 10) | length }}", MEMORY),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{{ '{:>10000000000}'.format(1) }}", MEMORY),
        ("{{ 'a'.ljust(10 ** 10) }}", MEMORY),
        ("{{ 'a' | center(10 ** 10) }}", MEMORY),
        ("{{ [[1]] | tojson(indent=10 ** 10) }}", MEMORY),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", MEMORY),
        ("{{ range(99999) | map('string') | join('x' * 99999) }}", MEMORY),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", CPU),
        ("{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", CPU),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
        ("{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}", DEEP),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", DEEP),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", r"it writes more than \d+ characters"),
    ],
)
def test_a_hostile_template_fails_soon_and_in_one_line(source: str, message: str) -> None:
    start = time.thread_time(), time.monotonic()
    match = f"bundle/chat_template.jinja cannot be used .*({message})"
    with pytest.raises(BundleError, match=match) as raised, template_of(source) as template:
        template.render(PLAIN)
    assert "\n" not in str(raised.value)
    assert time.thread_time() - start[0] < 1  # of this process; the other has its bound
    assert time.monotonic() - start[1] < 60


def test_a_template_that_fails_on_some_messages_serves_the_others() -> None:
    with template_of("{% if messages[0].role == 'bad' %}{{ 'a' * 10 ** 10 }}{% endif %}fine") as template:
        for _ in range(2):
            with pytest.raises(BundleError, match=MEMORY):
                template.render([{"role": "bad", "content": ""}])
            assert template.render(PLAIN) == "fine"


def test_the_longest_chat_that_is_taken_renders(chatml: ChatTemplate) -> None:
    content = "é" * ((GIVEN_BYTES - 1000) // len(json.dumps("é")[1:-1]))
    assert chatml.render([{"role": "user", "content": content}]) == f"[user]{content}"


def test_many_threads_may_render_at_once(chatml: ChatTemplate) -> None:
    def render(number: int) -> str:
        return chatml.render([{"role": "user", "content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, range(200))) == [f"[user]{number}" for number in range(200)]


def children() -> set[int]:
    """The processes that this one has started and not waited for."""
    return {child.pid for child in psutil.Process().children()}


def test_the_process_ends_with_its_template() -> None:
    before = children()
    closed, forgotten = template_of_nothing(), template_of_nothing()
    assert len(children() - before) == 2
    closed.close()
    closed.close()
    assert len(children() - before) == 1
    del forgotten
    gc.collect()
    assert children() == before
    with pytest.raises(RequestError, match="this chat template was closed; open it again"):
        closed.render(PLAIN)


def template_of_nothing() -> ChatTemplate:
    return ChatTemplate(Path("file"), {"default": ""}, {})


def test_a_process_that_was_killed_is_replaced() -> None:
    before = children()
    with template_of("fine") as template:
        (process,) = children() - before
        os.kill(process, 9)
        with pytest.raises(BundleError, match="was ended by SIGKILL"):
            template.render(PLAIN)
        assert template.render(PLAIN) == "fine"


@pytest.mark.parametrize(
    ("executable", "message"),
    [
        ("/no/python", r"cannot start '/no/python' to render chat templates \(No such file or directory\)"),
        ("/bin/false", r"the process that renders chat templates ended with 1; see what /bin/false .*chat_process.py"),
    ],
)
def test_a_python_that_does_not_start_is_reported(
    monkeypatch: pytest.MonkeyPatch, executable: str, message: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(StagelineError, match=message):
        template_of_nothing()

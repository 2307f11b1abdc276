"""What clients should not send and what stages should not do: the right status, and the service goes on."""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest

CHAT = [{"role": "user", "content": "cat"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MATS, RAN = 11, 9  # tokens


@pytest.fixture(autouse=True)
def _alive_after(service: Any) -> Iterator[None]:
    yield
    service.faults.step = lambda stage, inputs, outputs: None
    answer = service.post("completions", model="llama", prompt="a", temperature=0, max_tokens=3)
    assert answer.status_code == 200, answer.text
    assert service.client.get("/health/ready").status_code == 200
    assert service.metric('stageline_num_requests_running{model="llama"}') == 0


def refused(answer: httpx.Response, status: int, *message: str) -> dict[str, Any]:
    """The error of an answer that is one, as OpenAI's clients read it."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    for part in message:
        assert part in error["message"]
    return error


COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": [[]]}, "the prompt has no tokens"),
    ({"prompt": [-1]}, "prompt: give a text, a list of texts, a list of token ids"),
    ({"prompt": [10**30]}, "prompt: give a text"),
    ({"prompt": [12]}, "outside the vocabulary"),
    ({"prompt": 5}, "prompt: give a text"),
    ({"prompt": {"text": "a"}}, "prompt: give a text"),
    ({"prompt": ["a", 5]}, "prompt: give a text"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": "a\ud800"}, "not valid Unicode"),
    ({"temperature": -1}, "temperature is -1.0"),
    ({"temperature": 1e308}, "temperature is 1e+308"),
    ({"temperature": "hot"}, "temperature: input should be a valid number"),
    ({"temperature": True}, "temperature: input should be a valid number"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": -5}, "max_tokens is -5"),
    ({"max_tokens": 10**30}, "max_tokens is 1000"),
    ({"max_tokens": 2.5}, "max_tokens: input should be a valid integer"),
    ({"max_tokens": "7"}, "max_tokens: input should be a valid integer"),
    ({"n": 0}, "n is 0"),
    ({"n": 10**9}, "n is 1000000000"),
    ({"n": 100, "prompt": ["a", "a"]}, "more than 128"),
    ({"seed": -2}, "seed is -2"),
    ({"seed": 2**70}, "seed is"),
    ({"stop": ""}, "stop holds ''"),
    ({"stop": ["a"] * 17}, "more than 16 stops"),
    ({"stop": 5}, "stop"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"presence_penalty": 3}, "presence_penalty is 3"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens is 9"),
    ({"deadline_s": -1}, "deadline_s is -1"),
    ({"echo": "yes"}, "echo: input should be a valid boolean"),
    ({"echo": True, "max_tokens": -1}, "max_tokens is -1"),
    ({"echo": True, "logprobs": 21}, "logprobs is 21"),
    ({"echo": True, "logprobs": 1, "prompt": [12]}, "outside the vocabulary"),
    ({"echo": True, "logprobs": 1, "prompt": [[]]}, "the prompt has no tokens"),
    ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens is 1"),
    ({"best_of": 3}, "best_of must equal n"),
    ({"suffix": "x"}, "the model 'llama' has no tokens to fill in the middle with"),
    ({"suffix": "x", "echo": True}, "echo and suffix exclude each other"),
    ({"suffix": 5}, "suffix: input should be a valid string"),
    ({"logit_bias": {"cat": 1}}, "logit_bias gives 'cat' a bias of 1"),
    ({"logit_bias": {"5": 101}}, "logit_bias gives '5' a bias of 101"),
    ({"logit_bias": {"99": 1}}, "a bias is given for token 99"),
    ({"priority": 1.5}, "priority: input should be a valid integer"),
    ({"tempreature": 1}, "unknown or unsupported parameter 'tempreature'; known: model, "),
    ({"stream": "yes"}, "stream: input should be a valid boolean"),
    ({"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
    ({"model": 5}, "model: input should be a valid string"),
    ({"model": None}, "model is missing"),
    ({"model": "bert"}, "embeds; send requests to /v1/embeddings"),
]


@pytest.mark.parametrize(("body", "message"), COMPLETIONS, ids=[json.dumps(body)[:40] for body, _ in COMPLETIONS])
def test_a_wrong_completion_is_400(service: Any, body: dict[str, Any], message: str) -> None:
    content = json.dumps({"model": "llama", "prompt": "a", **body})  # in ASCII: \ud800 stays an escape
    headers = {"content-type": "application/json"}
    refused(service.client.post("/v1/completions", content=content, headers=headers), 400, message)


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "message"),
    ({"messages": "hello"}, "messages: input should be a valid list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "not valid Unicode"),
    ({"messages": [{**CHAT[0], "tool_calls": [CALL]}]}, "tool_calls are the assistant's, and tool_call_id is a tool's"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.0.tool_calls.0.function is missing"),
    ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
    ({"tools": ["weather"]}, "tools.0"),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [TOOL, TOOL]}, "two tools have the name 'f'; rename one"),
    ({"tools": [TOOL]}, "this model's chat template has no tools; leave them out, or set tool_choice to none"),
    ({"tools": [TOOL], "tool_choice": "always"}, 'give none, auto, required, or {"type": "function", "function": {'),
    ({"tool_choice": "required"}, "tool_choice is 'required', and the tools are none; give tools to choose from"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "is 'g', and the tools are f"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls: input should be a valid boolean"),
    ({"response_format": {"type": "json_object"}}, "this model's tokenizer cannot follow a structure"),
    ({"response_format": {"type": "json_schema"}}, "give json_schema with the type json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {}}, "give one of json, regex, choice, grammar and json_object"),
    ({"structured_outputs": {"choice": []}}, "choice is []; give a list of texts"),
    ({"structured_outputs": {"json": "{"}}, "the json_schema is not JSON"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "both ask for a structure"),
    ({"top_logprobs": 3}, "set logprobs to true"),
    ({"logprobs": 3}, "logprobs: input should be a valid boolean"),
    ({"logprobs": True, "top_logprobs": 99}, "logprobs is 99"),
]


@pytest.mark.parametrize(("body", "message"), CHATS, ids=[json.dumps(body)[:40] for body, _ in CHATS])
def test_a_wrong_chat_is_400(service: Any, body: dict[str, Any], message: str) -> None:
    content = json.dumps({"model": "llama", "messages": CHAT, **body})
    headers = {"content-type": "application/json"}
    refused(service.client.post("/v1/chat/completions", content=content, headers=headers), 400, message)


EMBEDDINGS: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input holds 0 texts"),
    ({"input": ["a"] * 2049}, "input holds 2049 texts"),
    ({"input": [[]]}, "no tokens"),
    ({"input": [10**30]}, "input: give a text"),
    ({"input": [99]}, "outside the vocabulary"),
    ({"input": "cat " * 50}, "at most 16 fit"),
    ({"input": [5] * 50}, "takes at most 16"),
    ({"dimensions": 10**6}, "dimensions is 1000000, the model's vectors have"),
    ({"dimensions": 0}, "dimensions: input should be greater than or equal to 1"),
    ({"truncate_prompt_tokens": 1}, "a text cut to 1 tokens has none of its own"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"model": "llama"}, "generates; send requests to /v1/chat/completions"),
    ({"prompt_name": "query"}, "prompt 'query' is not known; this model has none"),
    ({"prompt_name": "query", "input": [5]}, "prompt_name is for texts"),
]


@pytest.mark.parametrize(("body", "message"), EMBEDDINGS, ids=[json.dumps(body)[:40] for body, _ in EMBEDDINGS])
def test_a_wrong_embedding_is_400(service: Any, body: dict[str, Any], message: str) -> None:
    refused(service.post("embeddings", **{"model": "bert", "input": "a", **body}), 400, message)


def test_a_long_text_is_cut_where_that_is_asked_for(service: Any) -> None:
    answers = [
        service.post("embeddings", model="bert", input=given, truncate=True) for given in ("cat " * 50, [5] * 50)
    ]
    assert [answer.json()["usage"]["prompt_tokens"] for answer in answers] == [16, 16]


def test_what_changes_nothing_is_accepted(service: Any) -> None:
    more = {"user": "me", "store": False, "metadata": {}, "seed": None, "stop": None, "service_tier": "auto"}
    assert service.post("completions", model="llama", prompt="a", **more).status_code == 200


def test_values_that_ask_for_what_is_done_anyway_are_accepted(service: Any) -> None:
    neutral = {
        "n": 1, "seed": -1, "logit_bias": {}, "tools": [], "functions": [], "tool_choice": "auto", "top_logprobs": 0,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "frequency_penalty": 0, "top_k": -1,
    }  # fmt: skip
    sent_back = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": []}
    messages = [*CHAT, sent_back, *CHAT]
    for more in (
        {"messages": messages},
        {"tools": [TOOL], "tool_choice": "none"},
        *({name: value} for name, value in neutral.items()),
    ):
        answer = service.post("chat/completions", **{"model": "llama", "messages": CHAT, "max_tokens": 1, **more})
        assert answer.status_code == 200, (more, answer.text)
    more = {"best_of": 1, "suffix": "", "echo": False, "stream_options": {"include_usage": False}}
    assert service.post("completions", model="llama", prompt="a", max_tokens=1, **more).status_code == 200


def test_a_bias_makes_a_token_certain(service: Any) -> None:
    more = {"logit_bias": {"6": 100}, "temperature": 0, "max_tokens": 3}
    answer = service.post("completions", model="llama", prompt="a", **more).json()
    assert answer["choices"][0]["text"].split() == ["cat"] * 3


def test_a_prompt_over_capacity_says_so_in_a_code(service: Any) -> None:
    long = "cat " * 300
    for answer in (
        service.post("completions", model="llama", prompt=long),
        service.post("completions", model="llama", prompt=[5] * 300),
        service.post("chat/completions", model="llama", messages=[{"role": "user", "content": long}]),
        service.post("completions", model="llama", prompt=long, stream=True),
    ):
        error = refused(answer, 400, "takes at most 256")
        assert error["code"] == "context_length_exceeded"
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="llama", prompt=long)


def test_an_unknown_model_or_route_is_404(service: Any) -> None:
    def ask_for(model: str) -> httpx.Response:
        content = json.dumps({"model": model, "prompt": "a"})
        return httpx.post(
            f"{service.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )

    error = refused(ask_for("gpt-\ud800"), 404, "models: llama, bert")
    assert error["code"] == "model_not_found"
    refused(service.post("audio/speech"), 404)
    refused(service.client.get("/v1/models/nope"), 404)
    refused(service.client.get("/v1/completions"), 405)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model": "llama", "prompt": "\xff\xfe"}', b"[1, 2]", b'"text"', b"\x00" * 100, b"[" * 100_000,
     b'{"model": "llama", "prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
     b'{"model": "llama", "prompt": "a", "temperature": NaN}', b'{"model": "llama", "prompt": "a", "top_p": Infinity}'],
    ids=["empty", "half", "invalid UTF-8", "list", "text", "zeros", "deep", "digits", "NaN", "Infinity"],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_400(service: Any, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(service.client.post("/v1/completions", content=content, headers=headers), 400)


def test_another_content_type_is_400(service: Any) -> None:
    """A page in a browser may send text/plain to any address without asking."""
    content = json.dumps({"model": "llama", "prompt": "a"}).encode()
    answer = service.client.post("/v1/completions", content=content, headers={"content-type": "text/plain"})
    refused(answer, 400, "content-type application/json")


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_100_mb_is_413_and_never_held(service: Any, declared: bool) -> None:
    block = b" " * 2**20

    def blocks() -> Iterator[bytes]:
        for _ in range(100):
            yield block

    memory = "process_resident_memory_bytes"
    before = service.metric(memory)
    headers = {"content-type": "application/json"}
    if declared:
        headers["content-length"] = str(100 * len(block))
    answer = service.client.post("/v1/completions", content=blocks(), headers=headers)
    refused(answer, 413, "more than 4194304 bytes")
    assert service.metric(memory) - before < 40e6


def test_a_client_that_asks_before_it_sends_is_reported_at_once(service: Any) -> None:
    address = urlsplit(service.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 0), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [("refuse", 400, "no such chats"), ("escape", 500, "chat template"), ("loop", 500, "CPU time")],
)
def test_a_hostile_chat_template(service: Any, content: str, status: int, message: str) -> None:
    refused(
        service.post("chat/completions", model="llama", messages=[{"role": "user", "content": content}]),
        status,
        message,
    )
    assert service.post("chat/completions", model="llama", messages=CHAT).status_code == 200


def prompt_with(token: int, inputs: Mapping[str, Any]) -> Any:
    """Which packed tokens of a step are those of a short prompt with this token, bool [tokens]."""
    ids, places = inputs["input_ids"][:, 0], inputs["past_lengths"]
    short = places < 3
    return short & bool((short & (ids == token)).any())


def raising(stage: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    time.sleep(0.01)  # so that requests overlap
    if stage == 0 and prompt_with(MATS, inputs).any():
        raise RuntimeError("the device fell off")


def with_nans(stage: int, inputs: Mapping[str, Any], outputs: dict[str, Any]) -> None:
    time.sleep(0.01)
    if stage == 0:
        for value in outputs.values():
            if value.dtype == np.float32:
                value[prompt_with(RAN, inputs)] = np.nan


@pytest.mark.parametrize(
    ("fault", "word", "message"),
    [(raising, "mats", "the device fell off"), (with_nans, "ran", "logit of token 0 is nan")],
    ids=["raise", "NaN"],
)
def test_what_fails_in_a_stage_fails_its_requests_and_no_others(
    service: Any, fault: Any, word: str, message: str
) -> None:
    spared: dict[str, Any] = {"prompt": "a cat", "max_tokens": 150, "min_tokens": 150, "temperature": 0}
    alone = service.post("completions", model="llama", **spared).json()["choices"][0]["text"]
    service.faults.step = fault
    with service.stream("completions", model="llama", **spared) as beside:
        events = beside.iter_lines()
        begun = next(events)
        for stream in (False, True):
            answer = service.post("completions", model="llama", prompt=f"cat {word}", stream=stream)
            assert refused(answer, 500, message)["code"] == "engine_error"
        assert service.metric('stageline_num_requests_running{model="llama"}') == 1, "the other should still run"
        lines = [begun, *filter(None, events)]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone


def test_what_fails_in_the_middle_of_a_stream_ends_it_with_an_error_event(service: Any) -> None:
    steps = 0

    def fails_later(stage: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("worn out")

    service.faults.step = fails_later
    body = {"model": "llama", "messages": CHAT, "min_tokens": 100, "stream": True}
    answer = service.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    *chunks, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert len(chunks) > 3
    assert "worn out" in json.loads(last.removeprefix("data: "))["error"]["message"]
    steps = 0
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        messages: Any = CHAT
        with pytest.raises(openai.APIError, match="worn out"):
            list(
                client.chat.completions.create(
                    model="llama", messages=messages, stream=True, extra_body={"min_tokens": 99}
                )
            )


def test_a_deadline_is_504(service: Any) -> None:
    service.faults.step = lambda stage, inputs, outputs: time.sleep(0.02)
    answer = service.post("completions", model="llama", prompt="a", max_tokens=99, min_tokens=99, deadline_s=0.1)
    assert refused(answer, 504, "not finished within 0.1 s")["type"] == "timeout_error"

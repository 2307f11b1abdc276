"""Parameters of other servers' clients: what each of them changes, and the bodies that well-known clients send."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from stageline.runtime.service.schema import RESERVED

CHAT = [{"role": "user", "content": "cat sat on"}]


def test_ignore_eos_writes_on_after_an_end_token(service: Any) -> None:
    """What a load generator asks for: as many tokens as it says, whatever they are."""
    (end,) = service.pipelines["llama"].bundle.manifest.generation_defaults.end_ids
    body = {"model": "llama", "prompt": "a cat", "temperature": 0, "max_tokens": 9, "logit_bias": {str(end): 100}}
    stopped = service.post("completions", **body).json()
    assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 1)
    ignored = service.post("completions", **body, ignore_eos=True).json()
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 9)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_each_chunk_has_the_token_counts_so_far_where_they_are_asked_for(service: Any, route: str) -> None:
    prompt = {"messages": CHAT} if route.startswith("chat") else {"prompt": "a cat sat"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    more = {"max_tokens": 5, "min_tokens": 5, "temperature": 0, "stream_options": options}
    with service.stream(route, model="llama", **prompt, **more) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    *chunks, last = [json.loads(line)["usage"] for line in lines[:-1]]
    counts = [chunk["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["completion_tokens"] == 5
    assert {chunk["prompt_tokens"] for chunk in chunks} == {last["prompt_tokens"]}


def test_a_message_is_continued(service: Any) -> None:
    """The test's template ends with "a" after the messages, which a continued one leaves out."""
    pipeline = service.pipelines["llama"]
    messages = [*CHAT, {"role": "assistant", "content": "dog ran"}]
    want = pipeline.generate(pipeline.encoder.ids("user cat sat on assistant dog ran", special=False), max_tokens=5)
    common = {"model": "llama", "messages": messages, "temperature": 0, "max_tokens": 5}
    answer = service.post("chat/completions", **common, add_generation_prompt=False, continue_final_message=True)
    assert answer.json()["choices"][0]["message"]["content"] == want.result().text
    both = service.post("chat/completions", **common, continue_final_message=True)
    assert both.status_code == 400
    assert "exclude each other" in both.json()["error"]["message"]


def test_template_arguments_cannot_replace_ours(service: Any) -> None:
    body = {"model": "llama", "messages": CHAT, "max_tokens": 1}
    answer = service.post("chat/completions", **body, chat_template_kwargs={"enable_thinking": False})
    assert answer.status_code == 200, answer.text
    for name in RESERVED:
        answer = service.post("chat/completions", **body, chat_template_kwargs={name: []})
        assert answer.status_code == 400
        assert f"chat_template_kwargs may not set '{name}'" in answer.json()["error"]["message"]


def embedded(service: Any, **body: Any) -> Any:
    answer = service.post("embeddings", **{"model": "bert", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_vector_is_cut_and_has_length_one(service: Any) -> None:
    texts = ["a cat", "dog"]
    whole = np.array([one["embedding"] for one in embedded(service, input=texts)["data"]])
    cut = np.array([one["embedding"] for one in embedded(service, input=texts, dimensions=5)["data"]])
    np.testing.assert_allclose(cut, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), rtol=1e-5)


def test_a_text_is_cut_to_a_number_of_tokens(service: Any) -> None:
    words = "cat sat on a dog"
    short = embedded(service, input="cat sat", dimensions=4)
    (special,) = {short["usage"]["prompt_tokens"] - 2}
    cut = embedded(service, input=words, truncate_prompt_tokens=2 + special, dimensions=4)
    assert cut["usage"]["prompt_tokens"] == 2 + special
    assert cut["data"] == short["data"]
    assert embedded(service, input="cat " * 50, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 16
    assert embedded(service, input=[5] * 50, truncate_prompt_tokens=3)["usage"]["prompt_tokens"] == 3


# Bodies as these clients' sources make them (models and texts exchanged).
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm chat": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "cat"}]}], "stream": True,
         "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_completion_tokens": 4,
         "stop": None, "ignore_eos": True},
    ),
    "guidellm completions": (
        "completions",
        {"prompt": "a cat", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
         "max_tokens": 4, "stop": None, "ignore_eos": True},
    ),
    "inference-perf chat": (
        "chat/completions", {"messages": CHAT, "max_tokens": 4, "ignore_eos": True, "stream": False},
    ),
    "inference-perf completion": (
        "completions", {"prompt": "a cat", "max_tokens": 4, "ignore_eos": True, "stream": False},
    ),
    "vllm bench serve --ignore-eos": (
        "completions",
        {"prompt": "a cat", "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None, "stream": True,
         "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0},
    ),
    "sglang bench_serving": (
        "completions",
        {"prompt": "a cat", "temperature": 0.0, "best_of": 1, "max_tokens": 4, "stream": True, "ignore_eos": True},
    ),
    "lm-eval generate": (
        "completions",
        {"prompt": ["a cat"], "max_tokens": 4, "temperature": 0, "stop": ["dog"], "seed": 1234},
    ),
    "litellm embeddings": ("embeddings", {"input": ["a cat"], "dimensions": 8, "encoding_format": "float"}),
    "langchain nvidia embeddings": ("embeddings", {"input": ["a cat"], "input_type": "query"}),
    "llama.cpp clients": ("completions", {"prompt": "a cat", "cache_prompt": True, "seed": -1, "top_k": -1}),
    "dumped message": (
        "chat/completions",
        {"messages": [*CHAT, {"role": "assistant", "content": "a", "refusal": None, "function_call": None,
                              "tool_calls": None, "audio": None, "annotations": []}, *CHAT],
         "tools": [], "logit_bias": {}, "chat_template_kwargs": {}, "priority": 0, "max_tokens": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES)
def test_what_clients_send_is_answered(service: Any, client: str) -> None:
    route, body = BODIES[client]
    answer = service.post(route, model="bert" if route == "embeddings" else "llama", **body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")


def test_unknown_parameters_are_left_out_where_the_service_says_so(
    serve: Callable[..., AbstractContextManager[Any]],
) -> None:
    with serve(unknown_parameters="ignore") as service:
        stray = {"tool_servers": ["a"], "x\r\ny: z": 1, "use_beams": True}
        answer = service.post("completions", model="llama", prompt="a", max_tokens=2, **stray)
        assert answer.status_code == 200, answer.text
        assert answer.headers["warning"] == '299 stageline "ignored: tool_servers, x??y: z, use_beams"'
        assert "y" not in answer.headers
        assert "warning" not in service.post("completions", model="llama", prompt="a", max_tokens=2).headers
        for what in ({"prompt": "a"}, {"messages": CHAT}):
            answer = service.client.post("/tokenize", json={"model": "llama", "mood": "good", **what})
            assert answer.headers["warning"] == '299 stageline "ignored: mood"'
        assert service.post("completions", model="llama", prompt="a", temperature="hot").status_code == 400


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_how_many_tokens_were_cached(service: Any, route: str, stream: bool) -> None:
    text = f"{'cat sat on ' * 12}{route.count('s') * ' dog'}"
    given = {"chat/completions": "messages", "completions": "prompt", "responses": "input"}[route]
    body: dict[str, Any] = {given: [{"role": "user", "content": text}] if given == "messages" else text, "seed": 1}
    if stream:
        body["stream_options"] = {"include_usage": True}
    cached = []
    for _ in range(2):
        answer = service.post(route, model="llama", stream=stream, **body)
        assert answer.status_code == 200, answer.text
        if stream:
            events = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
            last = json.loads(events[-1])
        else:
            last = answer.json()
        usage = last.get("response", last)["usage"]
        cached.append(
            usage["input_tokens_details" if route == "responses" else "prompt_tokens_details"]["cached_tokens"]
        )
    assert cached[1] >= 36

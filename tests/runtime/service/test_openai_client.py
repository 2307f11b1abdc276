"""OpenAI's own client against the service; what it gets is compared with what the pipeline says when asked directly."""

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

CHAT: list[Any] = [{"role": "user", "content": "cat sat on"}]
PROMPT = "a cat sat"


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(service: Any) -> Callable[..., Any]:
    """What the pipeline itself makes of a prompt or of messages."""
    pipeline = service.pipelines["llama"]

    def complete(prompt: Any, **sampling: Any) -> Any:
        given = pipeline.chat_prompt(prompt) if isinstance(prompt, list) else prompt
        return pipeline.generate(given, **sampling).result(60)

    return complete


def test_chat_is_what_the_pipeline_says(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    want = direct(CHAT, max_tokens=12)
    answer = client.chat.completions.create(model="llama", messages=CHAT, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == want.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == want.choices[0].finish_reason
    assert answer.object == "chat.completion"
    assert answer.model == "llama"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (want.prompt_tokens, want.completion_tokens)
    assert answer.usage.total_tokens == want.prompt_tokens + want.completion_tokens


def test_content_may_be_parts_and_max_tokens_has_two_names(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "cat"}, {"type": "text", "text": "sat on"}]}]
    answer = client.chat.completions.create(model="llama", messages=parts, temperature=0, max_completion_tokens=5)
    assert answer.choices[0].message.content == direct([{"role": "user", "content": "cat\nsat on"}], max_tokens=5).text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    want = direct(CHAT, max_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model="llama", messages=CHAT, temperature=0, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *reported, last = chunks
    deltas = [chunk.choices[0].delta for chunk in reported]
    assert deltas[0].role == "assistant"
    assert deltas[0].content == ""
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == want.text
    reasons = [chunk.choices[0].finish_reason for chunk in reported]
    assert reasons == [None] * (len(reported) - 1) + [want.choices[0].finish_reason]
    assert all(chunk.usage is None for chunk in reported)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == want.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_bytes_of_a_stream_are_events_that_end_with_done(service: Any) -> None:
    body = {"model": "llama", "messages": CHAT, "stream": True, "max_tokens": 3}
    answer = service.client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    events = answer.text.split("\n\n")[:-1]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"
        assert "usage" not in event


def test_many_at_once_get_the_same_as_alone(service: Any, direct: Callable[..., Any]) -> None:
    prompts = [" ".join(["cat", "dog", "sat", "ran"][: 1 + i % 4]) for i in range(24)]
    want = [direct(prompt, max_tokens=10).text for prompt in prompts]

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        common: Any = {"model": "llama", "prompt": prompts[number], "temperature": 0, "max_tokens": 10}
        if number % 2:
            return (await client.completions.create(**common)).choices[0].text
        return "".join(
            [chunk.choices[0].text async for chunk in await client.completions.create(**common, stream=True)]
        )

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(len(prompts))))

    assert asyncio.run(all_of_them()) == want


def test_a_prompt_has_four_forms(client: openai.OpenAI, service: Any, direct: Callable[..., Any]) -> None:
    ids = service.pipelines["llama"].encoder.ids(PROMPT)
    want = direct(PROMPT, max_tokens=6).text
    forms: list[Any] = [PROMPT, [PROMPT], ids, [ids]]
    for form in forms:
        answer = client.completions.create(model="llama", prompt=form, temperature=0, max_tokens=6)
        assert [choice.text for choice in answer.choices] == [want], form
    both = client.completions.create(model="llama", prompt=[PROMPT, "dog"], temperature=0, max_tokens=6)
    assert [choice.text for choice in both.choices] == [want, direct("dog", max_tokens=6).text]
    assert [choice.index for choice in both.choices] == [0, 1]


def test_several_prompts_stream_side_by_side(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    prompts = [PROMPT, "dog", "mats on"]
    texts = ["", "", ""]
    stream = client.completions.create(model="llama", prompt=prompts, temperature=0, max_tokens=9, stream=True)
    reasons: dict[int, str] = {}
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    want = [direct(prompt, max_tokens=9) for prompt in prompts]
    assert texts == [completion.text for completion in want]
    assert reasons == {i: completion.choices[0].finish_reason for i, completion in enumerate(want)}


def test_a_completion_has_16_tokens_unless_more_are_asked_for(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="llama", prompt=PROMPT, extra_body={"min_tokens": 16})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    want = direct(CHAT, max_tokens=6, logprobs=3).choices[0].logprobs
    sampling: Any = {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(model="llama", messages=CHAT, **sampling)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    np.testing.assert_allclose([t.logprob for t in logprobs.content], [t.logprob for t in want], atol=1e-4)
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy: the likeliest was drawn
        assert bytes(token.bytes or []).decode() == token.token
    stream = client.chat.completions.create(model="llama", messages=CHAT, stream=True, **sampling)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    streamed = [token for part in parts if part is not None for token in part.content or []]
    assert [t.token for t in streamed] == [t.token for t in logprobs.content]


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    sampling: Any = {"temperature": 0, "max_tokens": 6, "logprobs": 2, "extra_body": {"min_tokens": 6}}
    choice = client.completions.create(model="llama", prompt=PROMPT, **sampling).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == 6
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob
    texts = ["" if token.startswith("[") else token for token in logprobs.tokens]  # a special token has a name, no text
    assert "".join(texts) == choice.text
    assert logprobs.text_offset == [sum(map(len, texts[:i])) for i in range(6)]


def test_n_choices_share_a_seed_and_come_again(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    want = direct(CHAT, max_tokens=10, n=4, seed=7, temperature=1.0)
    for _ in range(2):
        answer = client.chat.completions.create(model="llama", messages=CHAT, n=4, seed=7, max_tokens=10)
        assert [choice.message.content for choice in answer.choices] == [choice.text for choice in want.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    stream = client.chat.completions.create(model="llama", messages=CHAT, n=4, seed=7, max_tokens=10, stream=True)
    roles = []
    for chunk in stream:
        delta = chunk.choices[0].delta
        texts[chunk.choices[0].index] += delta.content or ""
        if delta.role:
            roles.append(chunk.choices[0].index)
    assert texts == [choice.text for choice in want.choices]
    assert sorted(roles) == [0, 1, 2, 3]


def test_text_ends_before_a_stop(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    whole = direct(PROMPT, max_tokens=12, min_tokens=12).text.split()
    stop = next(word for word in whole[1:] if word != whole[0])
    answer = client.completions.create(model="llama", prompt=PROMPT, temperature=0, max_tokens=12, stop=stop)
    assert answer.choices[0].text == direct(PROMPT, max_tokens=12, stop=stop).text
    assert stop not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_parameters_of_vllm_reach_the_runtime(client: openai.OpenAI, direct: Callable[..., Any]) -> None:
    ours: Any = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.3, "min_tokens": 4}
    want = direct(PROMPT, max_tokens=10, seed=3, temperature=1.0, presence_penalty=0.5, frequency_penalty=0.2, **ours)
    theirs: Any = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 3}
    answer = client.completions.create(model="llama", prompt=PROMPT, max_tokens=10, extra_body=ours, **theirs)
    assert answer.choices[0].text == want.text


def test_embeddings_are_the_model_s(client: openai.OpenAI, service: Any) -> None:
    texts = ["a cat", "a dog sat on mats", "mats"]
    bert = service.pipelines["bert"]
    want = bert.run(bert.encoder.encode(texts), ["sentence_embedding"])["sentence_embedding"]
    answer = client.embeddings.create(model="bert", input=texts)  # in base64, which the client asks for by itself
    np.testing.assert_array_equal(np.array([d.embedding for d in answer.data], np.float32), want)
    floats = client.embeddings.create(model="bert", input=texts, encoding_format="float")
    np.testing.assert_array_equal(np.array([d.embedding for d in floats.data], np.float32), want)
    raw = service.post("embeddings", model="bert", input=texts[0], encoding_format="base64").json()["data"][0]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw["embedding"]), "<f4"), want[0], atol=1e-5)
    tokens: Any = [bert.encoder.ids(text) for text in texts]
    ids = client.embeddings.create(model="bert", input=tokens)
    np.testing.assert_array_equal(np.array([d.embedding for d in ids.data], np.float32), want)
    assert answer.usage.prompt_tokens == sum(map(len, tokens))


def test_models_and_health(client: openai.OpenAI, service: Any) -> None:
    assert [model.id for model in client.models.list()] == ["llama", "bert"]
    assert client.models.retrieve("bert").owned_by == "stageline"
    for route in ("health", "health/live", "health/ready"):
        assert service.client.get(f"/{route}").status_code == 200


def test_metrics_count_what_was_asked(service: Any) -> None:
    def read() -> list[float]:
        return [
            service.metric('stageline_requests_total{model="llama",outcome="done"}'),
            service.metric('stageline_generation_tokens_total{model="llama"}'),
            service.metric('stageline_requests_total{model="bert",outcome="done"}'),
            service.metric('stageline_http_requests_total{route="/v1/completions",status="200"}'),
        ]

    assert service.post("completions", model="llama", prompt="a").status_code == 200
    assert service.post("embeddings", model="bert", input="a").status_code == 200
    before = read()
    assert service.post("completions", model="llama", prompt="a", max_tokens=5, min_tokens=5).status_code == 200
    assert service.post("embeddings", model="bert", input="a").status_code == 200
    assert np.subtract(read(), before).tolist() == [1, 5, 1, 1]
    assert service.metric('stageline_num_requests_running{model="llama"}') == 0
    assert service.metric('stageline_slots{model="llama"}') == 4
    assert 0 <= service.metric('stageline_kv_cache_usage_perc{model="llama"}') <= 1
    assert 0 <= service.metric('stageline_bubble_ratio{model="llama"}') <= 1
    assert service.metric('stageline_stage_busy_seconds_total{model="llama",stage="1"}') > 0
    assert service.metric("process_resident_memory_bytes") > 1e7


@pytest.mark.parametrize(
    ("name", "model", "many"),
    [
        ("e2e_request_latency", "llama", 1),
        ("time_to_first_token", "llama", 1),
        ("inter_token_latency", "llama", 4),
        ("request_queue_time", "llama", 1),
        ("e2e_request_latency", "bert", 1),
    ],
)
def test_times_are_histograms(service: Any, name: str, model: str, many: int) -> None:
    def read(end: str) -> float:
        return float(service.metric(f"stageline_{name}_seconds_{end}"))

    def ask() -> None:
        if model == "bert":
            service.post("embeddings", model="bert", input="a")
        else:
            service.post("completions", model="llama", prompt="a", max_tokens=5, min_tokens=5)

    label = f'model="{model}"'
    ask()
    before = [read(f"count{{{label}}}"), read(f"sum{{{label}}}"), read(f'bucket{{le="+Inf",{label}}}')]
    ask()
    count, total_s, below = np.subtract(
        [read(f"count{{{label}}}"), read(f"sum{{{label}}}"), read(f'bucket{{le="+Inf",{label}}}')], before
    )
    assert (count, below) == (many, many)
    assert 0 < total_s < 60
    assert read(f'bucket{{le="0.0001",{label}}}') <= read(f'bucket{{le="700.0",{label}}}')


def test_every_query_of_the_grafana_board_names_a_metric_and_labels_that_are_served(service: Any) -> None:
    """Grafana draws nothing, without a word, where a name or a label is wrong."""
    assert service.post("completions", model="llama", prompt="a").status_code == 200
    served: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(service.client.get("/metrics").text):
        for one in family.samples:
            served.setdefault(one.name, {"job", "instance"}).update(one.labels)
    board = json.loads((Path(__file__).parents[3] / "examples" / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["definition"] for one in board["templating"]["list"] if one["type"] == "query"]
    assert len(queries) > 20
    for query in queries:
        names = re.findall(r"(?:stageline|process)_[a-z0-9_]+", query)
        labels = [one for group in re.findall(r"by \(([^)]*)\)", query) for one in group.split(", ")]
        labels += re.findall(r"(\w+)=~?\"", query) + re.findall(r"label_values\(\w+, (\w+)\)", query)
        assert names, query
        for name in names:
            assert name in served, query
            assert set(labels) <= served[name], query

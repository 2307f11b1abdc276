"""Rerankers, classifiers and tokens over HTTP, against transformers, sentence-transformers and the tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from sentence_transformers import CrossEncoder
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app
from transformers import AutoModelForSequenceClassification, AutoTokenizer

QUERY, DOCUMENTS = "cat sat", ["a dog", "dog ran on a dog", "a cat sat on a dog", "cat"]


@pytest.fixture(scope="module")
def client(classifiers: dict[str, Path], bundles: dict[str, Path]) -> Iterator[TestClient]:
    opened = {
        **{name: Pipeline.open(folder / "bundle") for name, folder in classifiers.items()},
        **{name: Pipeline.open(bundle) for name, bundle in bundles.items()},
    }
    try:
        yield TestClient(create_app(opened))
    finally:
        for pipeline in opened.values():
            pipeline.close()


def test_documents_are_ranked_as_a_cross_encoder_ranks_them(client: TestClient, classifiers: dict[str, Path]) -> None:
    encoder = CrossEncoder(str(classifiers["reranker"] / "checkpoint"), device="cpu")
    encoder.tokenizer.pad_token = encoder.tokenizer.convert_ids_to_tokens(0)
    want = encoder.predict([(QUERY, document) for document in DOCUMENTS])
    order = np.argsort(-want)
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {"model": "reranker", "query": QUERY, "documents": [*DOCUMENTS[:3], {"text": DOCUMENTS[3]}]}
        answer = client.post(route, json=body).json()
        assert [one["index"] for one in answer["results"]] == order.tolist()
        assert [one["document"]["text"] for one in answer["results"]] == [DOCUMENTS[i] for i in order]
        got = [one["relevance_score"] for one in answer["results"]]
        np.testing.assert_allclose(got, want[order], atol=1e-5)
        first = client.post(route, json={**body, "top_n": 1, "return_documents": False}).json()["results"]
        assert first == [{"index": int(order[0]), "relevance_score": got[0]}]
    scores = client.post("/score", json={"model": "reranker", "text_1": QUERY, "text_2": DOCUMENTS}).json()
    np.testing.assert_allclose([one["score"] for one in scores["data"]], want, atol=1e-5)
    newer = {"model": "reranker", "queries": [QUERY] * 4, "documents": DOCUMENTS}
    assert client.post("/score", json=newer).json()["data"] == scores["data"]


def test_labels_are_those_of_transformers(client: TestClient, classifiers: dict[str, Path]) -> None:
    checkpoint = classifiers["classifier"] / "checkpoint"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    with torch.no_grad():
        given = tokenizer(DOCUMENTS, padding=True, return_tensors="pt")
        want = torch.softmax(model(**given).logits, -1).numpy()
    answer = client.post("/classify", json={"model": "classifier", "input": DOCUMENTS}).json()
    np.testing.assert_allclose([one["probs"] for one in answer["data"]], want, atol=1e-5)
    assert [one["label"] for one in answer["data"]] == [f"LABEL_{i}" for i in want.argmax(1)]
    assert {one["num_classes"] for one in answer["data"]} == {3}
    assert answer["usage"]["prompt_tokens"] == int(given["attention_mask"].sum())


def test_an_embedding_model_ranks_by_the_cosine(client: TestClient) -> None:
    vectors = client.post("/v1/embeddings", json={"model": "bert", "input": [QUERY, *DOCUMENTS]}).json()["data"]
    units = np.array([one["embedding"] for one in vectors])
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    scores = client.post("/score", json={"model": "bert", "text_1": [QUERY] * 4, "text_2": DOCUMENTS}).json()["data"]
    np.testing.assert_allclose([one["score"] for one in scores], units[1:] @ units[0], atol=1e-5)


@pytest.mark.parametrize("model", ["reranker", "bert"])
def test_texts_and_pairs_are_cut_as_vllms_clients_ask(client: TestClient, model: str) -> None:
    """`vllm bench serve --backend vllm-rerank` sends -1: to what the model takes."""
    asked = {"model": model, "query": "cat", "documents": ["cat mat " * 200, "cat"]}

    def answer(route: str = "/rerank", **more: Any) -> Any:
        answer = client.post(route, json={**asked, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    whole = answer(truncate_prompt_tokens=-1)
    assert whole["results"] == answer()["results"]
    if model == "bert":
        cut = answer(truncate_prompt_tokens=6)
        assert cut["usage"]["prompt_tokens"] <= 3 * 6 < whole["usage"]["prompt_tokens"]
    else:
        refused = client.post("/rerank", json={**asked, "truncate_prompt_tokens": 6})
        assert refused.status_code == 400
        assert "pairs of texts cannot be cut" in refused.json()["error"]["message"]
        asked = {"model": "classifier", "input": "cat " * 500}
        assert answer("/classify", truncate_prompt_tokens=6)["usage"]["prompt_tokens"] == 6


def test_text_embeddings_inferences_clients_are_answered(client: TestClient) -> None:
    """They name no model, and read a list."""
    asked = {"query": QUERY, "texts": DOCUMENTS, "truncate": True, "raw_scores": False}
    found = client.post("/rerank", json={**asked, "return_text": True}).json()
    first = next(one["id"] for one in client.get("/v1/models").json()["data"] if one["id"] != "llama")
    want = client.post("/rerank", json={"model": first, "query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert [(one["index"], one["score"], one["text"]) for one in found] == [
        (one["index"], one["relevance_score"], one["document"]["text"]) for one in want
    ]
    assert client.post("/rerank", json=asked).json()[0].keys() == {"index", "score"}
    for wrong in ({"query": "a"}, {**asked, "documents": ["a"]}):
        assert "give documents (or texts" in client.post("/rerank", json=wrong).json()["error"]["message"]


def test_texts_become_tokens_and_come_back(client: TestClient, bundles: dict[str, Path]) -> None:
    encoder = Pipeline.open(bundles["llama"]).encoder
    assert encoder is not None
    text = "a cat sat"
    answer = client.post("/tokenize", json={"model": "llama", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == encoder.ids(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
    assert len(answer["token_strs"]) == answer["count"]
    plain = client.post("/tokenize", json={"model": "llama", "prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == encoder.ids(text, special=False)
    assert client.post("/detokenize", json={"model": "llama", "tokens": plain["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "cat"}]
    chat = client.post("/tokenize", json={"model": "llama", "messages": messages}).json()
    assert chat["tokens"] == encoder.ids("user cat a", special=False)
    assert client.post("/tokenize", json={"prompt": "cat"}).status_code == 200  # the first model


def test_operators_see_version_and_load(client: TestClient) -> None:
    assert client.get("/version").json()["version"]
    assert client.get("/load").json() == {"server_load": 0}


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("rerank", {"model": "reranker", "query": "a", "documents": []}, 400, "documents holds 0 texts"),
    ("rerank", {"model": "bert", "query": "a", "documents": []}, 400, "documents holds 0 texts"),
    ("rerank", {"model": "reranker", "query": "a", "documents": ["a"], "top_n": 0}, 400, "top_n"),
    ("rerank", {"model": "reranker", "query": "a", "documents": ["a"] * 2049}, 400, "2049 texts"),
    ("rerank", {"model": "classifier", "query": "a", "documents": ["a"]}, 400, "a reranker gives one"),
    ("rerank", {"model": "llama", "query": "a", "documents": ["a"]}, 400, "generates; send requests to"),
    ("rerank", {"model": "gpt", "query": "a", "documents": ["a"]}, 404, "there is no model 'gpt'"),
    ("rerank", {"model": "reranker", "query": "a", "documents": ["a"], "rank_fields": []}, 400, "'rank_fields'"),
    ("score", {"model": "reranker", "text_1": ["a", "a"], "text_2": ["a"] * 3}, 400, "2 texts go with 3"),
    ("score", {"model": "reranker", "text_1": [], "text_2": ["a"] * 3}, 400, "0 texts go with 3"),
    ("score", {"model": "reranker", "text_1": [], "text_2": []}, 400, "text_2 holds 0 texts"),
    ("tokenize", {"model": "llama"}, 400, "prompt is missing"),
    ("tokenize", {"model": "llama", "messages": 5}, 400, "messages"),
    ("score", {"model": "reranker", "text_1": "a", "text_2": "a\ud800"}, 400, "not valid Unicode"),
    ("classify", {"model": "classifier", "input": []}, 400, "input holds 0 texts"),
    ("classify", {"model": "classifier", "input": "cat " * 500}, 400, "at most"),
    ("classify", {"model": "bert", "input": "a"}, 400, "embeds; send requests to"),
    ("detokenize", {"tokens": [-1]}, 400, "tokens"),
    ("v1/chat/completions", {"model": "reranker", "messages": []}, 400, "classifies; send requests to"),
]


@pytest.mark.parametrize(("route", "body", "status", "message"), WRONG)
def test_what_is_wrong_is_said(client: TestClient, route: str, body: dict[str, Any], status: int, message: str) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post(f"/{route}", content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]

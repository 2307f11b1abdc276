"""/pooling, by what the pipeline says when it is asked directly."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app

TEXTS = ["a cat", "a dog sat on mats", "mats"]


@pytest.fixture(scope="module")
def pipelines(classifiers: dict[str, Path], bundles: dict[str, Path]) -> Iterator[dict[str, Pipeline]]:
    paths = {"classifier": classifiers["classifier"] / "bundle", **bundles}
    opened = {name: Pipeline.open(path) for name, path in paths.items()}
    yield opened
    for pipeline in opened.values():
        pipeline.close()


@pytest.fixture(scope="module")
def client(pipelines: dict[str, Pipeline]) -> TestClient:
    return TestClient(create_app(pipelines))


def pooled(client: TestClient, **body: Any) -> list[Any]:
    answer = client.post("/pooling", json=body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    assert {one["object"] for one in data} == {"pooling"}
    return [one["data"] for one in data]


def test_a_model_gives_what_it_computes(client: TestClient, pipelines: dict[str, Pipeline]) -> None:
    bert = pipelines["bert"]
    encoder = bert.encoder
    assert encoder is not None
    given = encoder.encode(TEXTS)
    want = bert.run({spec.name: given[spec.name] for spec in bert.signature.inputs})
    vectors = pooled(client, model="bert", input=TEXTS)
    np.testing.assert_allclose(vectors, want["sentence_embedding"], atol=1e-6)
    assert pooled(client, model="bert", input=TEXTS, task="embed") == vectors
    cut = np.array(pooled(client, model="bert", input=TEXTS, dimensions=4))
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    tokens = pooled(client, model="bert", input=[encoder.ids(text) for text in TEXTS], task="token_embed")
    coded = pooled(client, model="bert", input=TEXTS, task="token_embed", encoding_format="base64")
    for place, (row, code) in enumerate(zip(tokens, coded, strict=True)):
        count = int(given["attention_mask"][place].sum())
        np.testing.assert_allclose(row, want["last_hidden_state"][place, :count], atol=1e-6)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(code), "<f4"), np.array(row, np.float32).ravel())
    (scores,) = pooled(client, model="classifier", input="a cat")
    np.testing.assert_allclose(scores, pipelines["classifier"].classify(["a cat"])[0], atol=1e-6)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "llama"}, "generates; send requests to /v1/chat/completions"),
    ({"task": "classify"}, "does embed and token_embed, not classify"),
    ({"model": "classifier", "task": "token_embed"}, "does classify, not token_embed"),
    ({"task": "plugin"}, "task: input should be"),
    ({"dimensions": 4, "task": "token_embed"}, "dimensions is for the task embed"),
    ({"dimensions": 10**6}, "dimensions is 1000000, the model's vectors have"),
    ({"input": []}, "input holds 0 texts"),
    ({"input": [[]]}, "no tokens"),
    ({"input": [99]}, "outside the vocabulary"),
    ({"input": "cat " * 50}, "at most 16 fit"),
    ({"input": 5}, "input: give a text"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"softmax": True}, "unknown or unsupported parameter 'softmax'; known: model"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=[json.dumps(body)[:40] for body, _ in WRONG])
def test_a_wrong_request_is_refused_in_one_line(client: TestClient, body: dict[str, Any], message: str) -> None:
    answer = client.post("/pooling", json={"model": "bert", "input": "a", **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]

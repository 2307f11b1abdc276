"""/v1/moderations, by OpenAI's client: a classifier's labels, where they say what is harmless."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from stageline.runtime.bundle.folder import Bundle, write_manifest
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app

TEXTS = ["a cat", "a dog sat on mats", "mats", "dog dog", "cat ran", "on on on"]
MODELS: dict[str, dict[str, Any]] = {
    "single": {"labels": ("hate", "OK", "violence"), "activation": "softmax"},
    "pair": {"labels": ("toxic", "spam", "non-toxic"), "activation": "softmax"},
    "several": {"labels": ("toxic", "insult", "threat"), "activation": "sigmoid"},
    "sentiment": {"labels": ("POSITIVE", "NEGATIVE", "MIXED"), "activation": "softmax"},
    "unnamed": {"activation": "sigmoid"},
    "logits": {"labels": ("toxic", "insult", "safe"), "activation": "none"},
}


@pytest.fixture(scope="module")
def pipelines(
    classifiers: dict[str, Path], bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pipeline]]:
    folder = tmp_path_factory.mktemp("moderations")
    with ExitStack() as stack:
        opened = {"bert": stack.enter_context(Pipeline.open(bundles["bert"]))}
        for name, changes in MODELS.items():
            path = shutil.copytree(classifiers["classifier"] / "bundle", folder / name)
            write_manifest(path, Bundle.open(path).manifest.model_copy(update=changes))
            opened[name] = stack.enter_context(Pipeline.open(path))
        opened["reranker"] = stack.enter_context(Pipeline.open(classifiers["reranker"] / "bundle"))
        yield opened


@pytest.fixture(scope="module")
def http(pipelines: dict[str, Pipeline]) -> TestClient:
    return TestClient(create_app(pipelines))


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


@pytest.mark.parametrize(("name", "harmless"), [("single", "OK"), ("pair", "non-toxic"), ("several", None)])
def test_labels_that_apply_are_flagged(
    client: openai.OpenAI, pipelines: dict[str, Pipeline], name: str, harmless: str | None
) -> None:
    labels = MODELS[name]["labels"]
    answer = client.moderations.create(model=name, input=TEXTS)
    want = pipelines[name].classify(TEXTS)
    flags = []
    for row, result in zip(want, answer.results, strict=True):
        found = result.model_dump(by_alias=True, exclude_unset=True)
        best = labels[int(row.argmax())]
        kept = {label: score for label, score in zip(labels, row.tolist(), strict=True) if label != harmless}
        assert found["category_scores"] == pytest.approx(kept, abs=1e-5)
        applies = {label: score > 0.5 if harmless is None else label == best for label, score in kept.items()}
        assert found["categories"] == applies
        assert found["flagged"] == any(applies.values())
        assert found["category_applied_input_types"] == {label: ["text"] for label in kept}
        flags.append(found["flagged"])
    assert answer.model == name
    np.testing.assert_array_equal(flags, [any(one.categories.model_dump().values()) for one in answer.results])


def test_the_first_classifier_answers_where_no_model_is_named(http: TestClient, client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a cat"}, {"type": "text", "text": "sat"}]
    (joined,) = client.moderations.create(input=parts).results
    (whole,) = client.moderations.create(model="single", input="a cat\nsat").results
    assert joined == whole
    assert http.post("/v1/moderations", json={"input": "cat " * 50, "truncate": True}).status_code == 200


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "bert"}, "embeds; send requests to /v1/embeddings"),
    ({"model": "reranker"}, "do not say what is harmless; send requests to /classify"),
    ({"model": "sentiment"}, "(POSITIVE, NEGATIVE, MIXED) do not say what is harmless"),
    ({"model": "unnamed"}, "(LABEL_0, LABEL_1, LABEL_2) do not say"),
    ({"model": "logits"}, "do not say"),
    ({"input": []}, "input holds 0 texts"),
    ({"input": 5}, "input: input should be a valid list"),
    ({"input": None}, "input is missing"),
    ({"input": [5]}, "input.0: input should be a valid string"),
    ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input"),
    ({"input": "cat " * 50}, "at most 16 fit"),
    ({"threshold": 0.1}, "unknown or unsupported parameter 'threshold'; known: model, input, truncate"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=[json.dumps(body)[:40] for body, _ in WRONG])
def test_a_wrong_request_is_refused_in_one_line(http: TestClient, body: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/moderations", json={"input": "a", **body})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]

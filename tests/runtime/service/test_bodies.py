"""Bodies of many values: refused before Python's lock is held for them, and no text is taken for values."""

import json
import time
from typing import Any

import pytest
from stageline.runtime.service import schema

JSON = {"content-type": "application/json"}


def body(prompt: str, more: str = "") -> bytes:
    return b'{"model": "llama", "max_tokens": 1, "prompt": ' + prompt.encode() + more.encode() + b"}"


@pytest.mark.parametrize(
    "content",
    [
        body("[" + "[1]," * 60_000 + "[1]]"),
        body("[" + "1," * 600_000 + "1]"),
        body("[" + "{}," * 60_000 + "{}]"),
        body('"a"', "".join(f', "k{number}": 1' for number in range(60_000))),
        body(r'"\"[", "a": [' + "[1]," * 60_000 + "[1]]"),
        json.dumps({"model": "llama", "prompt": [[1]] * 60_000}).encode("utf-16"),
    ],
    ids=["lists", "numbers", "objects", "names", "after a text with a bracket", "UTF-16"],
)
def test_too_many_values_are_refused(service: Any, content: bytes) -> None:
    answer = service.client.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert "holds more than 500000 values" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ['[{,:"' * 100_000, "\\" * 200_000 + "[:" * 100_000, "]},\n" * 200_000])
def test_a_text_weighs_nothing(service: Any, text: str) -> None:
    content = json.dumps({"model": "bert", "input": text, "truncate": True}).encode()
    answer = service.client.post("/v1/embeddings", content=content, headers=JSON)
    assert answer.status_code == 200, answer.text


def test_what_is_wrong_in_a_long_list_is_said_once(service: Any) -> None:
    """And no line is made of each value: that took seconds."""
    began = time.process_time()
    for wrong in ([1] * 200_000 + ["a"], ["a"] * 200_000 + [1], [[1] * 1000] * 300 + [{}]):
        with pytest.raises(ValueError, match="give a text") as raised:
            schema.CompletionRequest.model_validate({"model": "llama", "prompt": wrong})
        assert raised.value.error_count() == 1  # type: ignore[attr-defined]
    assert time.process_time() - began < 2
    messages = [{"role": "user", "content": "a"}] * (schema.MOST_MESSAGES + 1)
    answer = service.post("chat/completions", model="llama", messages=messages)
    assert answer.status_code == 400
    assert "at most 2048 items" in answer.json()["error"]["message"]
    many = {f"k{number}": 1 for number in range(1001)}
    answer = service.post("completions", model="llama", prompt="a", **many)
    assert "has 1003 names" in answer.json()["error"]["message"]


def test_what_holds_up_the_event_loop_is_seen(service: Any) -> None:
    name = "stageline_event_loop_delay_seconds"

    def late() -> float:
        """How often by more than 0.2 s."""
        return service.metric(f"{name}_count") - service.metric(f'{name}_bucket{{le="0.2"}}')

    before = late()
    service.server.servers[0].get_loop().call_soon_threadsafe(time.sleep, 0.3)
    time.sleep(0.5)
    assert late() >= before + 1
    assert service.metric(f"{name}_sum") > 0.25

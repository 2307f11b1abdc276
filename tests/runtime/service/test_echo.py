"""/v1/completions with the prompt in the answer: how likely it was, and what evaluation harnesses send and read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

LM_EVAL: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
"""What lm-eval's local-completions adds to model and prompt for a log likelihood."""
PROMPT = "a cat sat on mats"


@pytest.fixture(scope="module")
def log_softmax(word_llama_checkpoint: Path) -> Callable[[list[int]], Any]:
    """transformers' log probabilities of what comes after each token, [tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(word_llama_checkpoint, dtype=torch.float32).eval()

    def found(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return found


def completed(service: Any, **body: Any) -> Any:
    answer = service.post("completions", model="llama", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_log_likelihoods_that_lm_eval_asks_for_are_transformers(
    service: Any, log_softmax: Callable[[list[int]], Any]
) -> None:
    """As its `parse_logprobs` takes them: those of the continuation, without the token that was drawn."""
    prompts = [[2, 5, 6, 8, 10, 11], [2, 7], [5, 9, 10, 11, 4, 4, 4, 6]]
    contexts = [2, 1, 4]
    choices = completed(service, prompt=prompts, **LM_EVAL)["choices"]
    for ids, context, choice in zip(prompts, contexts, choices, strict=True):
        expected = log_softmax(ids)
        likely = choice["logprobs"]["token_logprobs"][context:-1]
        places = np.arange(context, len(ids))
        np.testing.assert_allclose(likely, expected[places - 1, ids[context:]], atol=1e-3)
        top = [max(one.values()) for one in choice["logprobs"]["top_logprobs"][context:-1]]
        greedy = [own == best for own, best in zip(likely, top, strict=True)]
        assert greedy == (expected[places - 1].argmax(axis=1) == ids[context:]).tolist()
        assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None


def test_nothing_is_drawn_where_no_tokens_are_asked_for(service: Any, log_softmax: Callable[[list[int]], Any]) -> None:
    answer = completed(service, prompt=PROMPT, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer["choices"]
    ids = service.pipelines["llama"].encoder.ids(PROMPT)
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    likely = choice["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(likely[1:], log_softmax(ids)[np.arange(len(ids) - 1), ids[1:]], atol=1e-3)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2] * (len(ids) - 1)
    assert completed(service, prompt=PROMPT, echo=True, max_tokens=0)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", [PROMPT, " a  cat\tsat", [2, 5, 6, 3, 8]], ids=["text", "blanks", "ids"])
def test_offsets_are_where_the_text_has_the_tokens(service: Any, prompt: Any) -> None:
    common = {"prompt": prompt, "temperature": 0, "max_tokens": 4, "min_tokens": 4, "logprobs": 1}
    plain, echoed = (completed(service, **common, echo=echo)["choices"][0] for echo in (False, True))
    before = prompt if isinstance(prompt, str) else "a cat sat"
    assert echoed["text"] == before + plain["text"]
    found = echoed["logprobs"]
    specials = {"[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"}
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert token in specials or echoed["text"][at:].startswith(token)
    assert "".join(token for token in found["tokens"] if token not in specials) == echoed["text"]
    drawn = plain["logprobs"]
    assert found["tokens"][-4:] == drawn["tokens"]
    assert found["text_offset"][-4:] == [len(before) + at for at in drawn["text_offset"]]
    np.testing.assert_allclose(found["token_logprobs"][-4:], drawn["token_logprobs"], atol=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_stream_begins_with_the_prompt(service: Any, max_tokens: int) -> None:
    common = {
        "prompt": [PROMPT, "dog"],
        "temperature": 0,
        "n": 2,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "echo": True,
    }
    whole = completed(service, **common)
    with service.stream("completions", model="llama", **common, stream_options={"include_usage": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for want in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == want["index"]]
        assert "".join(part["text"] for part in own) == want["text"]
        assert own[-1]["finish_reason"] == want["finish_reason"]
        for name, values in want["logprobs"].items():
            streamed = [value for part in own if part["logprobs"] for value in part["logprobs"][name]]
            if name == "token_logprobs":
                np.testing.assert_allclose(streamed[1:], values[1:], atol=1e-4)
            elif name != "top_logprobs":
                assert streamed == values


def test_vllms_prompt_logprobs_are_transformers(service: Any, log_softmax: Callable[[list[int]], Any]) -> None:
    """In each choice of completions, beside the choices of a chat; not in streams."""
    encoder = service.pipelines["llama"].encoder
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    asked: list[tuple[str, dict[str, Any], list[int]]] = [
        ("completions", {"prompt": PROMPT}, encoder.ids(PROMPT)),
        ("completions", {"prompt": PROMPT, "echo": True, "logprobs": 1}, encoder.ids(PROMPT)),
        ("chat/completions", chat, service.pipelines["llama"].chat_ids(chat["messages"])),
    ]
    for route, body, ids in asked:
        answer = service.post(route, model="llama", max_tokens=1, temperature=0, prompt_logprobs=3, **body).json()
        choice = answer["choices"][0]
        first, *found = answer["prompt_logprobs"] if "chat" in route else choice["prompt_logprobs"]
        assert first is None
        for one, token, expected in zip(found, ids[1:], log_softmax(ids), strict=False):
            order = np.argsort(-expected)
            assert one.keys() == {str(number) for number in (token, *order[:3])}
            for number, said in one.items():
                assert said["logprob"] == pytest.approx(expected[int(number)], abs=1e-3)
                place = int(np.flatnonzero(order == int(number))[0]) + 1
                assert said["rank"] == (place if place <= 3 else None)
        assert len(found) == len(ids) - 1
        if body.get("echo"):
            assert max(map(len, choice["logprobs"]["top_logprobs"][1:])) == 1
        refused = service.post(route, model="llama", stream=True, prompt_logprobs=1, **body)
        assert "not for streams" in refused.json()["error"]["message"]

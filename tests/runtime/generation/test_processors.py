"""A row's logits are changed as transformers' generate changes them, in its order, and nothing else is."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import GenerationDefaults
from stageline.runtime.generation.processors import Processors
from stageline.runtime.generation.request import Sampling
from stageline.runtime.generation.settings import Settings, decide

VOCABULARY = 24
tokens = st.integers(0, VOCABULARY - 1)


@pytest.fixture(scope="module")
def model() -> Any:
    """Only its choice of processors is used."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1
    )
    return transformers.LlamaForCausalLM(config)


@settings(deadline=None, max_examples=60)
@given(
    stated=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.7, 1.1, 1.8]),
            "no_repeat_ngram_size": st.integers(1, 4),
            "sequence_bias": st.lists(
                st.tuples(st.lists(tokens, min_size=1, max_size=3), st.floats(-5, 5, width=32)).map(list),
                min_size=1, max_size=4, unique_by=lambda pair: tuple(pair[0]),
            ),
            "bad_words_ids": st.lists(st.lists(tokens, min_size=1, max_size=2), min_size=1, max_size=4),
            "suppress_tokens": st.lists(tokens, min_size=1, max_size=4),
            "begin_suppress_tokens": st.lists(tokens, min_size=1, max_size=4),
            "min_new_tokens": st.integers(1, 4),
            "min_length": st.integers(1, 9),
        },
    ),
    prompt=st.lists(tokens, min_size=2, max_size=12),
    new=st.lists(tokens, max_size=6),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_every_mixture_is_that_of_transformers(
    model: Any, stated: dict[str, Any], prompt: list[int], new: list[int], seed: int
) -> None:
    ends = [3, 5]
    config = transformers.GenerationConfig(eos_token_id=ends, **stated)
    model._prepare_special_tokens(config, device="cpu")
    if "min_new_tokens" in stated:  # which goes first, as in generate
        config.min_length = None
    theirs = model._get_logits_processor(config, len(prompt), device="cpu")
    ours = Processors(decide(Sampling(), GenerationDefaults(**stated), len(prompt)), VOCABULARY, prompt, ends)
    random = np.random.default_rng(seed)
    text = list(prompt)
    for token in [*new, 0]:
        logits = random.normal(size=VOCABULARY).astype(np.float32)
        want = theirs(torch.tensor([text]), torch.from_numpy(logits)[None].clone())[0].numpy()
        np.testing.assert_allclose(ours.apply(logits), want, rtol=1e-6)
        assert ours.idle <= bool(np.array_equal(logits, want))
        ours.record(token)
        text.append(token)


def test_presence_and_frequency_penalties_follow_openais_formula_after_the_repetition_penalty() -> None:
    row = Processors(
        Settings(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.25), 3, prompt=[1], end_ids=[]
    )
    row.record(0)
    row.record(0)
    want = np.array([4 / 2 - 1 - 2 * 0.25, -4 * 2, 3.9], np.float32)
    np.testing.assert_allclose(row.apply(np.array([4.0, -4.0, 3.9], np.float32)), want, rtol=1e-6)


STATED = GenerationDefaults(
    repetition_penalty=1.3, suppress_tokens=(7,), top_p=0.8, temperature=0.6, stop_strings=("##",), max_new_tokens=9
)


def test_what_is_not_asked_is_as_the_checkpoint_says_and_greedy() -> None:
    made = decide(Sampling(), STATED, 4)
    assert (made.repetition_penalty, made.suppress_tokens, made.top_p, made.stop) == (1.3, (7,), 0.8, ("##",))
    assert (made.temperature, made.max_tokens) == (0, 9)


def test_an_explicit_neutral_value_overrides_the_checkpoint() -> None:
    asked = Sampling(repetition_penalty=1.0, suppress_tokens=(), top_p=1.0, stop=(), max_tokens=40)
    assert decide(asked, STATED, 4) == Settings(max_tokens=40)


def test_max_length_counts_the_prompt() -> None:
    defaults = GenerationDefaults(max_length=12)
    assert decide(Sampling(), defaults, 4).max_tokens == 8
    assert decide(Sampling(max_tokens=30), defaults, 12).max_tokens == 30
    with pytest.raises(RequestError, match="the prompt has 12 tokens, and the checkpoint's max_length is 12"):
        decide(Sampling(), defaults, 12)

"""Drafts change no token, whatever is right in them and whatever else a request asks for; and how many there are."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime import Pipeline
from stageline.runtime.bundle.recut import recut_copy
from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.request import Completion, Sampling
from stageline.runtime.generation.speculation import MOST, Speculation
from stageline.runtime.generation.step_times import StepTimes

WORDS = ["a", "cat", "dog", "sat", "ran", "on", "mats"]


class Sure(Lookup):
    """As sure as it is told to be."""

    def __init__(self, *given: float) -> None:
        super().__init__(())
        self.given = given

    def chances(self) -> Iterator[float]:
        return itertools.chain(itertools.accumulate(self.given, lambda a, b: a * b), itertools.repeat(0.0))


class Prompter(Lookup):
    """Drafts the rest of an answer that is known, with a wrong word here and there."""

    answers: ClassVar[list[list[int]]] = []
    rng: ClassVar[random.Random] = random.Random(0)

    def chances(self) -> Iterator[float]:
        return iter(())

    def draft(self, count: int) -> list[int]:
        given = list(self._tokens)
        known = [a[len(given) :] for a in self.answers if a[: len(given)] == given] or [[]]
        rest = [*self.rng.choice(known), *(self.rng.randrange(5, 12) for _ in range(count))][:count]
        return [self.rng.randrange(5, 12) if self.rng.random() < 0.15 else token for token in rest]


def bold(self: Speculation, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
    return [0 if row is None else max(0, min(limit, Prompter.rng.randrange(-1, 8))) for row, limit in rows]


def drawn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A prompt and settings at random."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 40)))
    settings: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "n": rng.choice([1, 1, 2])}
    if rng.random() < 0.6:
        settings |= {"temperature": rng.choice([0.5, 1.0, 2.0]), "seed": rng.randrange(99)}
        settings |= rng.choice([{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
    settings |= rng.choice(
        [{}, {}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}]
    )
    settings |= rng.choice([{}, {"logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 1}])
    settings |= rng.choice([{}, {"stop": ["cat ran"]}, {"ignore_eos": True}, {"min_tokens": 1}])
    return prompt, settings


def same(one: Completion, other: Completion) -> None:
    for a, b in zip(one.choices, other.choices, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert (x.token_id, x.text, len(x.top)) == (y.token_id, y.text, len(y.top))
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("engine", "stages", "slots"),
    [("onnxruntime", 1, 3), ("onnxruntime", 3, 8), ("openvino", 2, 1), ("openvino", 3, 4)],
)
def test_no_token_is_another(
    word_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, stages: int, slots: int
) -> None:
    bundle = word_llama if stages == 2 else recut_copy(word_llama, tmp_path / "cut", stages).path
    rng = random.Random(f"{engine} {stages}")
    requests = [drawn(rng) for _ in range(16)]
    monkeypatch.setattr("stageline.runtime.generation.speculation.Lookup", Prompter)
    monkeypatch.setattr(Speculation, "counts", bold)
    with Pipeline.open(bundle, engine=engine, slots=slots, prefill_chunk=16, capacity=96, draft="lookup") as pipeline:
        plain = [g.result() for g in [pipeline.generate(p, speculation=False, **s) for p, s in requests]]
        assert pipeline.stats().generation.drafted_tokens == 0
        encoder = pipeline.encoder
        assert encoder is not None
        prompts = [encoder.ids(prompt) for prompt, _ in requests]
        Prompter.answers = [
            [*prompt, *choice.token_ids] for prompt, done in zip(prompts, plain, strict=True) for choice in done.choices
        ]
        fast = [g.result() for g in [pipeline.generate(p, **s) for p, s in requests]]
        stats = pipeline.stats().generation
    for one, other in zip(plain, fast, strict=True):
        same(one, other)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    tokens = sum(done.completion_tokens for done in plain)
    assert stats.generated_tokens == 2 * tokens
    assert stats.accepted_tokens > 10  # or nothing was tried; how many depends on which steps have prompts too


def test_there_are_no_drafts_unless_they_are_asked_for(word_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "counts", bold)
    with Pipeline.open(word_llama) as pipeline:
        pipeline.generate("a cat sat", max_tokens=30, ignore_eos=True).result()
        assert pipeline.stats().generation.drafted_tokens == 0
    with pytest.raises(RequestError, match="draft is 'eagle'; it must be off, lookup or the folder of a bundle"):
        Pipeline.open(word_llama, draft="eagle")
    with pytest.raises(RequestError, match="speculation is 1; give True or False"):
        Sampling.of({"speculation": 1})


def best(rows: Sequence[tuple[Sequence[float], int]], base: float, each: float) -> float:
    """The most tokens a second that any choice of drafts has."""
    most = 0.0
    for counts in itertools.product(*(range(min(limit, len(likely)) + 1) for likely, limit in rows)):
        tokens = len(rows) + sum(counts)
        expected = len(rows) + sum(
            sum(itertools.accumulate(likely[:count], lambda a, b: a * b))
            for (likely, _), count in zip(rows, counts, strict=True)
        )
        most = max(most, expected / (base + each * tokens))
    return most


def taking(base: float, each: float) -> StepTimes:
    """Steps that take so many seconds, and so many more for each token."""
    times = StepTimes()
    times.line = lambda: (base, each)  # type: ignore[method-assign]
    return times


chance = st.integers(1, 94).map(lambda percent: percent / 100)


@given(
    st.lists(st.tuples(st.lists(chance, max_size=3), st.integers(0, 3)), min_size=1, max_size=3),
    st.sampled_from([0.01, 0.5, 3.0]), st.sampled_from([0.001, 0.05, 0.3, 1.0]),
)  # fmt: skip
def test_no_other_choice_has_more_tokens_a_second(
    rows: list[tuple[list[float], int]], base: float, each: float
) -> None:
    speculation = Speculation(taking(base, each))
    counts = speculation.counts([(Sure(*likely), limit) for likely, limit in rows])
    assert all(count <= limit for count, (_, limit) in zip(counts, rows, strict=True))
    tokens = len(rows) + sum(counts)
    expected = len(rows) + sum(
        sum(itertools.accumulate(likely[:count], lambda a, b: a * b))
        for (likely, _), count in zip(rows, counts, strict=True)
    )
    assert expected / (base + each * tokens) == pytest.approx(best(rows, base, each))


def test_a_draft_has_a_limit() -> None:
    speculation = Speculation(taking(1.0, 0.0))
    assert speculation.counts([(Sure(*[0.999] * 100), 90), (Sure(*[0.999] * 100), 3), (None, 9)]) == [MOST, 3, 0]

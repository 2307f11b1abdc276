"""Drafts by a small model change no token; what it guesses right is kept, and what it cannot be is refused."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stageline.models.errors import EngineError, RequestError
from stageline.runtime import Pipeline
from stageline.runtime.generation.draft_model import DraftModel, DraftRow
from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.request import Completion
from stageline.runtime.generation.speculation import Speculation
from stageline.runtime.pipeline import PipelineStats

RNG = random.Random(3)
KINDS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (2, {"logprobs": 1}), (1, {"repetition_penalty": 1.3}), (1, {}), (1, {"top_k": 3}), (2, {})
]  # fmt: skip


def bold(self: Speculation, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
    counts = [0 if row is None else max(0, min(limit, RNG.randrange(-1, 6))) for row, limit in rows]
    for (row, _), count in zip(rows, counts, strict=True):
        if count and row is not None:
            row.read()
    return counts


def answers(
    bundle: Path, draft: str, engine: str = "onnxruntime", **more: Any
) -> tuple[list[Completion], PipelineStats]:
    """What becomes of some requests, more than there are slots."""
    rng = random.Random(1)
    with Pipeline.open(bundle, engine=engine, slots=3, capacity=96, prefill_chunk=16, draft=draft) as pipeline:
        running = [
            pipeline.generate(
                [rng.randrange(5, 12) for _ in range(rng.randrange(1, 70))], max_tokens=rng.randrange(2, 30), n=n,
                ignore_eos=True, temperature=[0.0, 1.0][number % 2], seed=number, **settings,
            )
            for number, (n, settings) in enumerate(KINDS * 2)
        ]  # fmt: skip
        return [one.result() for one in running], pipeline.stats()


def tokens(done: Sequence[Completion]) -> list[list[tuple[int, ...]]]:
    return [[choice.token_ids for choice in one.choices] for one in done]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("other", [False, True])
def test_no_token_is_another(word_llama: Path, monkeypatch: pytest.MonkeyPatch, engine: str, other: bool) -> None:
    monkeypatch.setattr(Speculation, "counts", bold)
    monkeypatch.setattr("stageline.runtime.generation.draft_model._CHUNK", 8)
    if other:  # guesses that have nothing to do with the model: the last token again
        monkeypatch.setattr(DraftModel, "_step", lambda self, new: [tokens[-1] for tokens in new.values()])
    plain, _ = answers(word_llama, "off", engine)
    drafted, stats = answers(word_llama, str(word_llama), engine)
    assert tokens(drafted) == tokens(plain)
    generation = stats.generation
    assert generation is not None
    assert generation.drafted_tokens > 50
    assert 0 < generation.accepted_tokens < generation.drafted_tokens  # half of the requests draw at random


def test_a_model_that_is_always_right_is_asked_by_itself_and_one_that_fails_no_more(
    word_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DraftModel, "drafting", lambda self, rows: 0.0)
    with Pipeline.open(word_llama, draft=str(word_llama)) as pipeline:
        want = pipeline.generate([5, 6, 7], max_tokens=60, ignore_eos=True, speculation=False).result()
        got = pipeline.generate([5, 6, 7], max_tokens=60, ignore_eos=True).result()
        stats = pipeline.stats().generation
        assert stats is not None
        assert stats.drafted_tokens > 20
        assert stats.accepted_tokens == stats.drafted_tokens

        def fails(self: DraftModel, new: object) -> list[int]:
            raise EngineError("no more")

        monkeypatch.setattr(DraftModel, "_step", fails)
        again = pipeline.generate([5, 6, 7], max_tokens=60, ignore_eos=True).result()
    assert tokens([want]) == tokens([got]) == tokens([again])
    assert "there are no drafts any more: no more" in caplog.text


def test_a_row_learns_what_its_drafts_were_worth_and_forgets_what_was_wrong() -> None:
    learnt: list[bool] = []
    row = DraftRow(given := [1, 2, 3], 0.5, learnt.append)
    row.read()
    row.held, row.drafted = [1, 2, 3, 7, 8], [7, 8, 9]
    before = next(row.chances())
    given += [7, 5]
    row.read()
    assert row.held == [1, 2, 3, 7]
    assert row.drafted == []
    assert next(row.chances()) < before
    row.held, row.drafted = [1, 2, 3, 7, 5, 6], [6, 6]
    given += [6, 6, 4]
    row.read()
    assert row.held == [1, 2, 3, 7, 5, 6]
    assert learnt == [True, False, True, True]
    chances = row.chances()
    assert next(chances) ** 2 == pytest.approx(next(chances))


def test_a_bundle_that_cannot_draft_is_refused(
    word_llama: Path, llama_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"has another vocabulary; give one of the same tokenizer$"):
        Pipeline.open(word_llama, draft=str(llama_bundle))
    monkeypatch.setattr("stageline.runtime.generation.draft_model._words", lambda model: 0)
    with pytest.raises(RequestError, match=r"can place 64 tokens; lower capacity, which is 256$"):
        Pipeline.open(word_llama, draft=str(llama_bundle), capacity=256)
    with pytest.raises(RequestError, match=r"does not generate; give one that does$"):
        Pipeline.open(word_llama, draft=str(tiny_bundle))

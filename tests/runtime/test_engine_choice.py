"""The choice of an engine: from real engines on real bundles, remembered, and with planted figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llamas import TIED
from stageline.models.errors import EngineError
from stageline.runtime import engine_choice
from stageline.runtime.engine_choice import Candidate, EngineChoice, chosen
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def silent(line: str) -> None:
    pass


def test_engines_are_measured_once_and_the_choice_runs(export_once: Callable[..., Path]) -> None:
    bundle, options, told = export_once(TIED), PipelineOptions(slots=2), list[str]()
    first = chosen(bundle, options, None, told.append)
    ran = {one.engine for one in first.candidates if not one.refused}
    assert ran == {"onnxruntime", "openvino"}
    assert all(one.error < 1e-4 for one in first.candidates)
    assert first.best.tokens_per_s == max(one.tokens_per_s for one in first.candidates)
    assert len(told) == len(first.candidates)
    assert len(list(first.lines())) == len(first.candidates)
    assert chosen(bundle, options, None, told.append) == first
    assert len(told) == len(first.candidates), "it was measured again"
    with Pipeline.open(bundle, first.applied(options)) as pipeline:
        assert pipeline.stats().generation is not None


def test_an_encoder_is_measured_in_batches(tiny_bundle: Path) -> None:
    choice = chosen(tiny_bundle, PipelineOptions(), None, silent)
    assert choice.best.tokens_per_s > 0


def planted(monkeypatch: pytest.MonkeyPatch, *found: Candidate) -> None:
    def measured(*_: Any) -> list[Candidate]:
        return list(found)

    monkeypatch.setattr(engine_choice, "_measured", measured)


def test_the_fastest_within_the_budget_is_chosen(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Candidate(engine="onnxruntime", tokens_per_s=10)
    rough = Candidate(engine="onnxruntime", quantise="int4", tokens_per_s=30, error=0.5)
    close = Candidate(engine="openvino", quantise="int8", tokens_per_s=20, error=0.04)
    away = Candidate(engine="tensorrt", refused="no GPU")
    planted(monkeypatch, exact, rough, close, away)
    choice = chosen(tiny_bundle, PipelineOptions(), 0.05, silent)
    assert choice == EngineChoice(candidates=(close, exact, rough, away), budget=0.05)
    assert choice.applied(PipelineOptions(slots=3)) == PipelineOptions("openvino", quantise="int8", slots=3)
    assert list(choice.lines()) == [
        "openvino with int8 weights: 20 tokens/s (chosen), error 0.04",
        "onnxruntime: 10 tokens/s (0.50 times that), error 0",
        "onnxruntime with int4 weights: 30 tokens/s (1.50 times that), error 0.5, above the budget of 0.05",
        "tensorrt: no GPU",
    ]


def test_where_none_is_within_the_budget_it_says_what_there_is(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rough = Candidate(engine="onnxruntime", quantise="int4", tokens_per_s=30, error=0.5)
    planted(monkeypatch, rough, Candidate(engine="openvino", refused="no operator X"))
    message = r"no engine here runs .* within an error of 0\.01: .*: error 0\.5; .*: no operator X"
    with pytest.raises(EngineError, match=message):
        chosen(tiny_bundle, PipelineOptions(), 0.01, silent)


def test_a_memory_that_was_damaged_is_measured_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Candidate(engine="onnxruntime", tokens_per_s=10)
    planted(monkeypatch, one)
    chosen(tiny_bundle, PipelineOptions(), None, silent)
    (file,) = (tmp_path / "cache" / "stageline" / "engines").iterdir()
    for text in ("", "{}", '[{"engine": 1}]', "[1]", '{"candidates": [], "budget": null}'):
        file.write_text(text)
        assert chosen(tiny_bundle, PipelineOptions(), None, silent).best == one

"""Perplexity beside torch's cross entropy, in windows, and what the command says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.commands.cli import main
from stageline.exporter.verify.perplexity import WINDOW, evaluation_texts, perplexity, windows
from stageline.models.errors import RequestError
from stageline.runtime.bench.inputs import built_in_texts
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.text_model import open_encoder
from stageline.runtime.options import PipelineOptions

LONG = " ".join(["a cat sat on a dog", "mats ran", "the dog sat"] * 40)  # more than the model's 256 positions
TEXTS = (LONG, "a cat sat", "dog")


def test_it_is_what_torch_computes_in_the_same_windows(word_llama_checkpoint: Path, word_llama: Path) -> None:
    found = perplexity(word_llama, word_llama_checkpoint, TEXTS, PipelineOptions(capacity=256))
    model = transformers.LlamaForCausalLM.from_pretrained(word_llama_checkpoint, dtype=torch.float32).eval()
    encoder = open_encoder(Bundle.open(word_llama))
    assert encoder is not None
    losses: list[float] = []
    for row in map(encoder.ids, TEXTS):
        with torch.no_grad():
            logits = {
                start: model(torch.tensor([row[start : start + 256]])).logits[0] for start in range(0, len(row), 128)
            }
        for place in range(1, len(row)):
            start = 0 if place < 256 else 128 * math.ceil((place - 255) / 128)  # the first window that holds the token
            predicted = logits[start][place - start - 1]
            losses.append(float(torch.nn.functional.cross_entropy(predicted, torch.tensor(row[place]))))
    assert found.window == 256
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-2)
    assert found.agreement is not None
    assert found.agreement > 0.95


@pytest.mark.parametrize(("length", "size"), [(2, 8), (8, 8), (9, 8), (100, 8), (31, 7), (12, 2)])
def test_each_token_but_the_first_counts_once(length: int, size: int) -> None:
    row = tuple(range(length))
    found = list(windows(row, size))
    assert [token for window in found for token in window.tokens[window.first :]] == list(row[1:])
    assert all(len(window.tokens) <= size and window.first >= 1 for window in found)
    assert all(window.first >= size // 2 for window in found[1:])


def test_texts_of_evaluation_and_calibration_are_others() -> None:
    assert WINDOW >= 256
    assert len(evaluation_texts()) == 10
    assert not set(evaluation_texts()) & set(built_in_texts())


def test_the_command_says_both(
    word_llama: Path, word_llama_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("a cat sat\ndog ran\n")
    given = ["verify", str(word_llama), "--perplexity", "--texts", str(tmp_path / "texts.txt")]
    assert main([*given, "--against", str(word_llama_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["increase"] == pytest.approx(found["perplexity"] / found["reference_perplexity"] - 1)
    assert main(given) == 0
    assert f"perplexity {found['perplexity']:.3f} of {found['tokens']} tokens of 2 texts" in capsys.readouterr().out


def test_models_that_do_not_generate_and_empty_texts_are_refused(tiny_bundle: Path, word_llama: Path) -> None:
    with pytest.raises(RequestError, match="does not generate text"):
        perplexity(tiny_bundle, None, TEXTS, PipelineOptions())
    with pytest.raises(RequestError, match="no two tokens"):
        perplexity(word_llama, None, [], PipelineOptions())

"""Scores are those of transformers' pipelines, or of sentence-transformers for a CrossEncoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stageline.exporter import classifier, skeleton
from stageline.exporter.trace_model import Wanted
from stageline.models.checkpoint import Checkpoint
from stageline.models.cross_encoder import cross_encoder
from stageline.runtime.scores import scores

_NAMES: dict[str, Any] = {"none": torch.nn.Identity(), "sigmoid": torch.nn.Sigmoid(), "softmax": torch.nn.Softmax(1)}


def wanted(folder: Path) -> Wanted:
    checkpoint = Checkpoint.open(folder)
    config = skeleton.config_of(checkpoint.config)
    return Wanted(checkpoint, config, "text-classification", "bfloat16", None, 1, print, cross_encoder(checkpoint))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(1, None), (3, None), (3, "single_label_classification"), (3, "multi_label_classification"), (1, "regression"),
     (3, "regression")],
)  # fmt: skip
def test_scores_are_those_of_transformers_pipelines(
    make_checkpoint: Callable[..., Path], tmp_path: Path, labels: int, problem: str | None
) -> None:
    source = make_checkpoint(tmp_path / "c", num_labels=labels, problem_type=problem)
    model = transformers.BertForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.classifier.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, pad_token="[PAD]")
    made = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    want = {one["label"]: one["score"] for one in made(["a cat sat"])[0]}
    with torch.no_grad():
        logits = model(**tokenizer("a cat sat", return_tensors="pt")).logits.numpy()
    got = scores(logits, classifier.activation(wanted(source)))[0]
    names = classifier.labels(wanted(source))
    assert names is not None
    assert dict(zip(names, got.tolist(), strict=True)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("activation", [None, torch.nn.Identity(), torch.nn.Sigmoid(), torch.nn.Softmax(dim=1)])
def test_scores_are_those_of_sentence_transformers(
    make_checkpoint: Callable[..., Path], tmp_path: Path, labels: int, activation: Any
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = make_checkpoint(tmp_path / "source", num_labels=labels)
    made = sentence_transformers.CrossEncoder(str(source), device="cpu", activation_fn=activation)
    made.save_pretrained(str(tmp_path / "saved"))
    read = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    logits = torch.randn(2, labels)
    ours = _NAMES[classifier.activation(wanted(tmp_path / "saved"))](logits)
    assert torch.equal(ours, read.activation_fn(logits))


def test_an_activation_that_is_code_is_not_run(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As in sentence-transformers, which takes the default then."""
    source = make_checkpoint(tmp_path / "c", num_labels=1, sbert_ce_default_activation_function="my.module.Own")
    read = wanted(source)
    assert classifier.activation(read) == "sigmoid"
    assert read.notes == ["the CrossEncoder's activation 'my.module.Own' is its own code; scores are as without it"]
    source = make_checkpoint(tmp_path / "d", num_labels=1, sbert_ce_default_activation_function="torch.nn.GELU")
    assert classifier.activation(wanted(source)) == "none"

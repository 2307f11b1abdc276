"""Quality beside speed: against torch's cross entropy, and by what quantising a model loses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.models.errors import RequestError
from stageline.runtime.bench.quality import Subject, check, reference_of
from stageline.runtime.bench.records import Quality
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.generation.text_model import open_encoder
from stageline.runtime.options import PipelineOptions
from stageline.runtime.report.quality import quality

TEXTS = ("a cat sat", "dog", "the dog sat on a mat", "")
PLAIN, INT4 = PipelineOptions(), PipelineOptions(quantise="int4")


def test_perplexity_is_what_torch_computes(word_llama_checkpoint: Path, word_llama: Path) -> None:
    found = check(Subject("it", word_llama, PLAIN), None, TEXTS)
    model = transformers.LlamaForCausalLM.from_pretrained(word_llama_checkpoint, dtype=torch.float32).eval()
    encoder = open_encoder(Bundle.open(word_llama))
    assert encoder is not None
    rows = [row for row in map(encoder.ids, TEXTS) if len(row) > 1]
    losses: list[float] = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none").tolist()
    assert found == Quality(None, len(rows), sum(map(len, rows)), pytest.approx(math.exp(np.mean(losses)), rel=1e-4))


def test_a_bundle_agrees_with_itself_entirely(word_llama: Path) -> None:
    found = check(Subject("it", word_llama, PLAIN), Subject("itself", word_llama, PLAIN), TEXTS)
    assert found.agreement == 1.0
    assert found.perplexity == found.reference_perplexity


def other_weights(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """A checkpoint like this one with other weights, and its bundle."""
    config = json.loads((checkpoint / "config.json").read_text())
    synthesize(config, folder / "checkpoint", seed=6, dtype="bfloat16")
    for file in checkpoint.glob("*token*"):
        shutil.copy(file, folder / "checkpoint")
    export(folder / "checkpoint", folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


def test_agreement_is_the_share_of_places_where_torch_agrees(
    word_llama_checkpoint: Path, word_llama: Path, tmp_path: Path
) -> None:
    checkpoint, bundle = other_weights(word_llama_checkpoint, tmp_path)
    found = check(Subject("it", word_llama, PLAIN), Subject("other", bundle, PLAIN), TEXTS)
    encoder = open_encoder(Bundle.open(word_llama))
    assert encoder is not None
    ours, theirs = (
        transformers.LlamaForCausalLM.from_pretrained(one, dtype=torch.float32).eval()
        for one in (word_llama_checkpoint, checkpoint)
    )
    same: list[bool] = []
    for ids in (torch.tensor([encoder.ids(text)]) for text in TEXTS):
        with torch.no_grad():
            same += (ours(ids).logits.argmax(-1) == theirs(ids).logits.argmax(-1))[0, :-1].tolist()
    assert 0 < sum(same) < len(same)
    assert found.agreement == pytest.approx(np.mean(same))
    assert found.reference_perplexity is not None
    times = f"{(found.perplexity or 0) / found.reference_perplexity:.3g}"
    said = quality(found)
    assert f"{times} times the reference's {found.reference_perplexity:.4g}" in said
    assert f"the same next token as the reference at {100 * np.mean(same):.1f} % of places. Reference: other" in said


def test_an_encoder_is_compared_by_cosine(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    same = check(Subject("it", tiny_bundle, PLAIN), Subject("itself", tiny_bundle, PLAIN), TEXTS)
    assert same.cosines == pytest.approx([1.0] * same.texts)
    _, bundle = other_weights(tiny_checkpoint, tmp_path)
    found = check(Subject("it", tiny_bundle, PLAIN), Subject("other", bundle, PLAIN), TEXTS)
    assert all(-1 <= cosine < 0.999 for cosine in found.cosines)
    assert f"{np.mean(found.cosines):.4f} on average, {min(found.cosines):.4f} at least" in quality(found)


def test_what_changes_the_numbers_is_compared_with_what_does_not(tiny_bundle: Path) -> None:
    reference = reference_of(Bundle.open(tiny_bundle), INT4, None)
    assert reference == Subject("the same bundle in onnxruntime, not quantised", tiny_bundle, PLAIN)
    given = reference_of(Bundle.open(tiny_bundle), INT4, tiny_bundle)
    assert given == Subject(str(tiny_bundle), tiny_bundle, PLAIN)


def test_without_anything_to_compare_with_an_encoder_is_refused(tiny_bundle: Path) -> None:
    assert reference_of(Bundle.open(tiny_bundle), PLAIN, None) is None
    with pytest.raises(RequestError, match="needs a reference; give --quantise, or --check-against BUNDLE"):
        check(Subject("it", tiny_bundle, PLAIN), None, TEXTS)


def test_a_reference_of_another_model_is_refused(tiny_bundle: Path, word_llama: Path) -> None:
    with pytest.raises(RequestError, match="other is of another kind of model; give a bundle"):
        check(Subject("it", word_llama, PLAIN), Subject("other", tiny_bundle, PLAIN), TEXTS)


def test_texts_too_short_to_foretell_anything_are_refused(word_llama: Path) -> None:
    with pytest.raises(RequestError, match="--check has no text of two tokens; give longer ones"):
        check(Subject("it", word_llama, PLAIN), None, [])

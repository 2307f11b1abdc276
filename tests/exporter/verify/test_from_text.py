"""verify finds agreement from text to answer, and each fault that is planted on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stageline.exporter.export import export
from stageline.exporter.synthesize import synthesize
from stageline.exporter.verify import from_text
from stageline.exporter.verify.against_torch import Verification, verify
from stageline.exporter.verify.from_text import TEXTS, _parting
from stageline.models.errors import ExportError
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = sorted({letter for text in TEXTS for letter in text if not letter.isspace()})
VOCABULARY = [*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), "quick", "fox", "rain", "##ain", "day"]
LABELS = {"0": "joy", "1": "anger", "2": "fear"}
Make = Callable[[str], tuple[Path, Path]]


def write_tokenizer(folder: Path) -> None:
    """A cased tokenizer of letters and some words."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]", "pad_token": "[PAD]",
              "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


@pytest.fixture(scope="module")
def made(made_once: Callable[..., Path]) -> Make:
    """A checkpoint in bfloat16 of an architecture, and its bundle; do not change them."""

    def make(architecture: str) -> tuple[Path, Path]:
        def checkpoint(folder: Path) -> None:
            config: dict[str, Any] = {
                "model_type": "llama" if "Llama" in architecture else "bert", "architectures": [architecture],
                "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2,
                "vocab_size": len(VOCABULARY), "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 2,
                "eos_token_id": 3, "id2label": LABELS, "label2id": {name: int(n) for n, name in LABELS.items()},
            }  # fmt: skip
            synthesize(config, folder, seed=4, dtype="bfloat16")
            write_tokenizer(folder)

        source = made_once(f"texts-{architecture}-from", checkpoint)
        return source, made_once(f"texts-{architecture}", lambda folder: export(source, folder))

    return make


def steps(done: Verification) -> dict[str, bool]:
    return {text.step: text.passed for text in done.texts}


@pytest.mark.parametrize(
    ("architecture", "value"),
    [
        ("BertForSequenceClassification", "scores"),
        ("BertModel", "last_hidden_state"),
        ("LlamaForCausalLM", "greedy tokens"),
        pytest.param("BertForTokenClassification", "scores of labels", marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", "scores of tokens", marks=pytest.mark.slow),
    ],
)
def test_texts_are_answered_as_transformers_answers_them(made: Make, architecture: str, value: str) -> None:
    source, bundle = made(architecture)
    done = verify(bundle, source, seed=2)
    assert done.passed, (done.comparisons, done.texts)
    assert [(text.step, text.value) for text in done.texts] == [("text to tokens", "input_ids"),
                                                                ("text to answer", value)]  # fmt: skip
    assert max(done.lengths) == 96  # as many as it has positions


def test_a_reference_that_answers_no_texts_is_said(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the tokenizer gives token types to a model of one type."""

    def fails(*arguments: Any, **named: Any) -> Any:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(from_text.transformers, "pipeline", fails)
    source, bundle = made("BertForSequenceClassification")
    with pytest.raises(
        ExportError, match=r"transformers itself does not answer texts with .*index out of range in self"
    ):
        verify(bundle, source, seed=2)


def planted(bundle: Path, folder: Path, **manifest: Any) -> Path:
    """A copy whose manifest has other values, and the digests of the files that lie there."""
    copy = Bundle.open(bundle).manifest.model_copy(update=manifest)
    files = tuple(file_entry(folder, entry.path) for entry in copy.files)
    write_manifest(folder, copy.model_copy(update={"files": files}))
    return folder


def test_a_lowering_tokenizer_is_found(made: Make, tmp_path: Path) -> None:
    source, bundle = made("BertForSequenceClassification")
    copy = shutil.copytree(bundle, tmp_path / "b")
    file = copy / "tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizers.Lowercase()
    file.unlink()
    tokenizer.save(str(file))
    done = verify(planted(bundle, copy), source, seed=2)
    assert all(comparison.passed for comparison in done.comparisons)
    assert not steps(done)["text to tokens"]
    assert done.texts[0].worst in TEXTS


def test_another_activation_of_a_classifier_is_found(made: Make, tmp_path: Path) -> None:
    source, bundle = made("BertForSequenceClassification")
    copy = shutil.copytree(bundle, tmp_path / "b")
    done = verify(planted(bundle, copy, activation="sigmoid"), source, seed=2)
    assert all(comparison.passed for comparison in done.comparisons)
    assert steps(done) == {"text to tokens": True, "text to answer": False}


def test_a_cross_encoder_scores_pairs_as_sentence_transformers_does(made: Make, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    source, bundle = made("BertForSequenceClassification")
    source = Path(shutil.copytree(source, tmp_path / "s"))
    stated = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(stated))
    copy = shutil.copytree(bundle, tmp_path / "b")
    assert not steps(verify(bundle, source, seed=2))["text to answer"]
    done = verify(planted(bundle, copy, activation="none"), source, seed=2)
    assert done.passed
    assert done.texts[1].value == "scores (sentence-transformers)"


def test_a_branch_on_length_is_found_in_the_long_row(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertSelfAttention

    source, bundle = made("BertModel")
    forward = BertSelfAttention.forward

    def longer_rows_differ(self: Any, hidden_states: Any, *args: Any, **options: Any) -> Any:
        result = forward(self, hidden_states, *args, **options)
        return (result[0] + 3, *result[1:]) if hidden_states.shape[1] > 64 else result

    monkeypatch.setattr(BertSelfAttention, "forward", longer_rows_differ)
    done = verify(bundle, source, seed=2)
    assert not done.passed
    assert not done.comparisons[0].passed


def test_greedy_tokens_part_where_the_reference_holds_both_as_likely_or_not() -> None:
    import torch

    scores = [torch.tensor([[1.0, 4.0, 3.9]])] * 2
    assert _parting([1, 2], [1, 2], scores) == 0
    assert _parting([1, 2], [1, 1], scores) == pytest.approx(0.1 / 4)
    assert _parting([1, 0], [1, 1], scores) == pytest.approx(3 / 4)
    assert _parting([1], [1, 1], scores) == float("inf")

"""A checkpoint and a bundle so small that making them costs a second."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

TINY_BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": None,
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "on", "mats")


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """A word tokenizer with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(words[:5]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))


def _make_checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny BERT with random weights and a tokenizer; `changes` are entries of its config."""
    from stageline.exporter.synthesize import synthesize

    config: Mapping[str, Any] = {**TINY_BERT, **changes}
    synthesize(config, folder, seed=5, dtype="float32")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """Makes a tiny BERT in the folder it is given; keywords are changes to its config."""
    return _make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier of three blocks; do not change it."""
    return _make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported to two stages; do not change it, copy it."""
    from stageline.exporter.export import export

    return export(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "bundle", stages=2).path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks that generates, exported to one stage; do not change it, copy it."""
    from stageline.exporter.export import export

    folder = tmp_path_factory.mktemp("llama")
    return export(_make_checkpoint(folder / "checkpoint", **TINY_LLAMA), folder / "bundle").path

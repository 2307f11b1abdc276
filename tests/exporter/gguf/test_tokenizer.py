"""The tokenizer of a .gguf gives the tokens of the one that the file was made of."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.exporter.gguf.tokenizer import save_tokenizer, tokenizer_notes
from stageline.models.checkpoint import Checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

gguf = pytest.importorskip("gguf", reason="needs gguf")
spm = pytest.importorskip("sentencepiece", reason="needs sentencepiece")

CORPUS = [
    "The quick brown fox jumps over 12 lazy dogs in 2024, don't they?", "naïve café 日本語 🙂",
    "x1y22z333 4444 55555", "def f(a, b):\n    return a + b\n\n", "  two  spaces   three",
] * 20  # fmt: skip
TEXTS = ["Hello world", "in 2024, 12345 don't we're", "  two  spaces", "ünïcode 日本 🙂 here", "a\n\n\tb", " ", "x", "",
         "a<tool>b <tool> c", "dogs<|user|>dogs<｜User｜>jumps"]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS: dict[str, Any] = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
}


def byte_level(split: str) -> Tokenizer:
    """A trained byte-level tokenizer with control tokens, one of them outside the alphabet, and a plain added one."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<｜User｜>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def write(path: Path, fill: Callable[[Any], None]) -> Checkpoint:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Checkpoint.open(path)


def written(checkpoint: Checkpoint, folder: Path) -> Tokenizer:
    folder.mkdir()
    save_tokenizer(checkpoint, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def fill_byte_level(tokenizer: Tokenizer, split: str | None) -> Callable[[Any], None]:
    def fill(writer: Any) -> None:
        tokens = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
        added = {number: 3 if token.special else 4 for number, token in tokenizer.get_added_tokens_decoder().items()}
        writer.add_tokenizer_model("gpt2")
        if split is not None:
            writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_types([added.get(number, 1) for number in range(len(tokens))])
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(tokens.index("<s>"))
        writer.add_eos_token_id(tokens.index("</s>"))

    return fill


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_tokens_are_the_originals(tmp_path: Path, split: str) -> None:
    original = byte_level(split)
    checkpoint = write(tmp_path / "t.gguf", fill_byte_level(original, split))
    assert tokenizer_notes(checkpoint) == []
    made = written(checkpoint, tmp_path / "tokenizer")
    begin = [original.token_to_id("<s>")] if split == "llama-bpe" else []  # Llama 3 begins every text so
    for text in TEXTS:
        expected = original.encode(text, add_special_tokens=False).ids
        assert made.encode(text).ids == [*begin, *expected], text
        assert made.decode(expected) == original.decode(expected)


@pytest.fixture(scope="module", params=[True, False], ids=["prefixed", "not prefixed"])
def sentencepiece(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=request.param, remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<tool>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue()), request.param


def test_sentencepiece_tokens_are_the_originals(tmp_path: Path, sentencepiece: tuple[Any, bool]) -> None:
    original, prefixed = sentencepiece
    numbers = range(original.vocab_size())

    def kind(number: int) -> int:
        if original.id_to_piece(number) == "<tool>":
            return 4
        return 2 if original.is_unknown(number) else 3 if original.is_control(number) else (
            6 if original.is_byte(number) else 1
        )  # fmt: skip

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(number) for number in numbers])
        writer.add_token_scores([original.get_score(number) for number in numbers])
        writer.add_token_types([kind(number) for number in numbers])
        writer.add_bos_token_id(original.bos_id())
        writer.add_eos_token_id(original.eos_id())
        writer.add_unk_token_id(original.unk_id())
        writer.add_add_space_prefix(prefixed)

    made = written(write(tmp_path / "t.gguf", fill), tmp_path / "tokenizer")
    for text in TEXTS:
        if prefixed and "<tool>" in text:
            continue  # llama.cpp puts a space after an added token, sentencepiece does not
        expected = original.encode(text)
        assert made.encode(text).ids == [original.bos_id(), *expected], text
        if text.strip() == text:
            assert made.decode(expected) == original.decode(expected)


def test_llama_cpp_puts_a_space_after_an_added_token_too(tmp_path: Path, sentencepiece: tuple[Any, bool]) -> None:
    original, prefixed = sentencepiece
    space = original.piece_to_id("▁")

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "<tool>"])
        writer.add_token_scores([0.0] * 6)
        writer.add_token_types([2, 3, 3, 1, 1, 4])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefixed)

    made = written(write(tmp_path / "t.gguf", fill), tmp_path / "tokenizer")
    assert space > 0
    assert made.encode("a<tool>a").ids == ([1, 3, 4, 5, 3, 4] if prefixed else [1, 4, 5, 4])


def test_a_tokenizer_that_cannot_be_right_is_left_out_and_named(tmp_path: Path) -> None:
    original = byte_level("gpt-2")
    unknown = write(tmp_path / "t.gguf", fill_byte_level(original, "deepseek-coder"))
    assert tokenizer_notes(unknown) == [
        "the bundle has no tokenizer, because how tokenizer.ggml.pre 'deepseek-coder' splits text is not known; "
        "give token ids, or put tokenizer.json beside the file"
    ]
    save_tokenizer(unknown, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()

    bert = write(tmp_path / "b.gguf", lambda writer: writer.add_tokenizer_model("bert"))
    assert (
        "because tokenizer.ggml.model 'bert' is not known; known: gemma4, gpt2, llama, t5" in tokenizer_notes(bert)[0]
    )
    none = write(tmp_path / "n.gguf", lambda writer: None)
    assert "because the file holds none" in tokenizer_notes(none)[0]


def test_a_split_that_is_not_stated_and_other_templates_are_noted(tmp_path: Path) -> None:
    def fill(writer: Any) -> None:
        fill_byte_level(byte_level("gpt-2"), None)(writer)
        writer.add_chat_template([{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}])

    checkpoint = write(tmp_path / "t.gguf", fill)
    assert tokenizer_notes(checkpoint) == [
        "the file has no tokenizer.ggml.pre, so text is split as GPT-2's is",
        "of the chat templates only the default is taken, not rag",
    ]
    folder = tmp_path / "tokenizer"
    written(checkpoint, folder)
    assert (folder / "chat_template.jinja").read_text() == "{{ 1 }}"

"""Text becomes arrays, and what cannot become one is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.models.errors import CheckpointError, RequestError
from stageline.models.tokenizer import TextEncoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PAD, UNK, CLS, SEP, A, B, C = range(7)
MINILM = Path("models/checkpoints/minilm/tokenizer.json")


def tokenizer_file(tmp_path: Path, special: bool) -> Path:
    """A tokenizer of the words a, b and c, with a padding and a truncation of its own."""
    vocabulary = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP, "a": A, "b": B, "c": C}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if special:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    return TextEncoder.open(tokenizer_file(tmp_path, special=True), max_length=6, pad_id=PAD)


def test_texts_are_padded_on_the_right_to_the_longest(encoder: TextEncoder) -> None:
    arrays = encoder.encode(["a b c", "b"])
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}
    assert arrays["input_ids"].tolist() == [[CLS, A, B, C, SEP], [CLS, B, SEP, PAD, PAD]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert arrays["token_type_ids"].tolist() == [[0] * 5, [0] * 5]


def test_pairs_are_joined_and_typed(encoder: TextEncoder) -> None:
    arrays = encoder.encode(["a"], ["b c"])
    assert arrays["input_ids"].tolist() == [[CLS, A, SEP, B, C, SEP]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_the_tokenizers_own_limits_are_off(encoder: TextEncoder) -> None:
    assert encoder.count("a b c") == 5
    assert encoder.encode(["a b c"])["input_ids"].shape == (1, 5)


def test_a_long_text_is_refused_with_the_numbers(encoder: TextEncoder) -> None:
    with pytest.raises(
        RequestError, match=r"text 1 has 7 tokens, at most 6 fit; shorten it, or in Python pass truncate=True"
    ):
        encoder.encode(["a", "a b c a b"])


def test_truncation_keeps_the_closing_token(encoder: TextEncoder) -> None:
    arrays = encoder.encode(["a b c a b", "a"], truncate=True)
    assert arrays["input_ids"].tolist() == [[CLS, A, B, C, A, SEP], [CLS, A, SEP, PAD, PAD, PAD]]
    assert encoder.encode(["a b c"], ["a b c"], truncate=True)["input_ids"].shape == (1, 6)
    assert encoder.count("a b c a b") == 7


def test_an_empty_text_is_fine_where_special_tokens_stand(encoder: TextEncoder) -> None:
    assert encoder.encode([""])["input_ids"].tolist() == [[CLS, SEP]]


def test_an_empty_text_without_special_tokens_is_refused(tmp_path: Path) -> None:
    encoder = TextEncoder.open(tokenizer_file(tmp_path, special=False), max_length=6, pad_id=PAD)
    with pytest.raises(RequestError, match=r"text 1 \(''\) has no tokens; give a text with some"):
        encoder.encode(["a", ""])


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        ([], None, "no texts were given; pass at least one"),
        ("a", None, r"a single text was given where a list of texts is needed; pass \[text\]"),
        (["a", 3], None, "text 1 is a int; give a str"),
        (["a", None], None, "text 1 is a NoneType; give a str"),
        (["a"], [b"b"], "text 0 is a bytes; give a str"),
        (["a"], ["a", "b"], "1 texts were given with 2 pairs; give one pair for each text"),
        (["\ud800"], None, "text 0 is not valid Unicode"),
    ],
)
def test_what_is_no_batch_of_texts_is_refused(encoder: TextEncoder, texts: Any, pairs: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encoder.encode(texts, pairs)


def test_ids_become_text_without_the_special_ones(encoder: TextEncoder) -> None:
    assert encoder.decode([CLS, A, B, SEP]) == "a b"
    assert encoder.decode(np.array([A, C])) == "a c"
    assert encoder.decode([]) == ""


@pytest.mark.parametrize("token", [-1, 2**40])
def test_senseless_ids_are_refused(encoder: TextEncoder, token: int) -> None:
    with pytest.raises(RequestError, match=r"a token id is negative or too large"):
        encoder.decode([token])


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read as a tokenizer"):
        TextEncoder.open(tmp_path / "tokenizer.json", max_length=6, pad_id=0)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read as a tokenizer \(No such file"):
        TextEncoder.open(tmp_path / "tokenizer.json", max_length=6, pad_id=0)


@pytest.mark.checkpoints
@pytest.mark.skipif(not MINILM.is_file(), reason="needs the reference checkpoint: stageline models fetch minilm")
def test_minilm_gives_the_known_tokens() -> None:
    encoder = TextEncoder.open(MINILM, max_length=256, pad_id=0)
    assert encoder.encode(["Hello world"])["input_ids"].tolist() == [[101, 7592, 2088, 102]]
    assert encoder.decode([101, 7592, 2088, 102]) == "hello world"


def test_tokens_that_decode_leaves_out_are_reported(encoder: TextEncoder) -> None:
    left_out = [token for token in (PAD, UNK, CLS, SEP, A, B, C, 1000) if encoder.leaves_out(token)]
    assert left_out == [PAD, UNK, CLS, SEP, 1000]
    assert encoder.decode([A, 1000, B]) == "a b"


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, and a special one before each text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(letters))])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Words with the blank before them, in the manner of SentencePiece."""
    words = ["<unk>", "\u2581a", "\u2581cat", "\u2581sat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "pieces"),
    [
        (bytes_tokenizer, "a\u00e9 \U0001f642b", ["", "a", "", "\u00e9", " ", "", "", "", "\U0001f642", "b"]),
        (bytes_tokenizer, "<|im_start|>a", ["", "<|im_start|>", "a"]),
        (bytes_tokenizer, "", [""]),
        (metaspace_tokenizer, "a cat  sat ", ["a", " cat", " ", " sat", " "]),
    ],
)
def test_each_token_has_a_piece_of_its_text(make: Callable[[], Tokenizer], text: str, pieces: list[str]) -> None:
    encoder = TextEncoder(make(), 100, 0)
    assert encoder.pieces(text) == (encoder.ids(text), pieces)

"""What tokens add to a text: whole characters as text, all else as bytes; nothing for those that decode leaves out."""

import pytest
from stageline.models.token_bytes import is_byte_level
from stageline.models.tokenizer import TextEncoder
from tokenizers import Tokenizer, decoders, models


def tokenizer_of(names: list[str], decoder: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.decoder = decoder
    return tokenizer


def test_tokens_of_a_byte_level_tokenizer_are_their_bytes() -> None:
    tokenizer = tokenizer_of(["Ġthe", "âĤ¬", "âĤ", "¬", "A", "ï¿½"], decoders.ByteLevel())
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["ein Wort €"])
    found = TextEncoder(tokenizer, max_length=9, pad_id=0).token_bytes
    assert found is not None
    assert [found[token] for token in range(9)] == [
        " the", "€", b"\xe2\x82", b"\xac", "A", "\ufffd".encode(), "", "ein Wort €", "",
    ]  # fmt: skip
    assert len(found) == 9  # kept


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    ],
)
def test_other_tokens_depend_on_their_neighbours(decoder: object) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    assert not is_byte_level(tokenizer)
    assert TextEncoder(tokenizer, max_length=9, pad_id=0).token_bytes is None

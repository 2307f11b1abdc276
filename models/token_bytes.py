"""What each token adds to a text, of a tokenizer whose tokens are bytes: then a text needs no decoding.

GPT-2's tokenizer and its many heirs (tokenizers' ByteLevel decoder) write each byte as a character of its own. A text
is the bytes of all its tokens as UTF-8, whatever stands beside a token; those of no character become U+FFFD.
"""

import json
from typing import Any

UNFINISHED = "\ufffd"  # what decoding makes of bytes that are not a whole character, or not yet


class TokenBytes(dict[int, str | bytes]):
    """Token id -> what it adds to a text, filled as tokens are asked for. It is a str where that is whole characters,
    whatever comes before and after; bytes where a character may begin or end inside, or is U+FFFD itself."""

    def __init__(self, tokenizer: Any, left_out: frozenset[int]) -> None:
        """`left_out`: the special tokens, which add nothing; nor do ids that the tokenizer does not know."""
        super().__init__()
        self._tokenizer, self._left_out = tokenizer, left_out

    def __missing__(self, token: int) -> str | bytes:
        name = None if token in self._left_out else self._tokenizer.id_to_token(token)
        written = _written_bytes(name or "")
        found: str | bytes = written
        try:
            text = written.decode()
        except UnicodeDecodeError:
            pass
        else:
            found = written if text.endswith(UNFINISHED) else text
        self[token] = found
        return found


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` turns tokens into text by their bytes alone."""
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    return bool(json.loads(decoder.__getstate__())["type"] == "ByteLevel")


def _written_bytes(name: str) -> bytes:
    """The bytes that a token's name stands for; an added token may have other characters, and stands for itself."""
    try:
        return bytes([_BYTES[character] for character in name])
    except KeyError:
        return name.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's character of each byte: itself where it is printed, else the next from U+0100 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printed else next(others)): byte for byte in range(256)}


_BYTES = _alphabet()

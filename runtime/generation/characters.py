"""Whole characters from tokens as they come: by the tokens' bytes, or by decoding the last few tokens together.

tokenizers has a DecodeStream; as of 0.23 it raises where invalid bytes follow a character written in bytes
(`<0xC3><0xA9><0xF0>` and then a letter), holds invalid bytes back for ever, and then takes longer with each token.
"""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from stageline.models.token_bytes import UNFINISHED, TokenBytes
from stageline.models.tokenizer import TextEncoder

_CHARACTER_BYTES = 4  # the most a character has in UTF-8; a token has at least one
_WINDOW_TOKENS = 16
_CONTEXT_TOKENS = 8


class Characters(Protocol):
    """The text of one choice. What is given joined is what its tokens add to the decoded prompt; at the end, at most
    three U+FFFD are held back: the bytes of a character that is not finished yet may look like that."""

    def push(self, token: int) -> str:
        """The text that is certain with this token: all but a character at the end that may be unfinished."""
        ...

    def finish(self) -> str:
        """The rest of the text."""
        ...


def characters_of(encoder: TextEncoder, prompt: Sequence[int]) -> Characters:
    """Those of a tokenizer, after a prompt."""
    token_bytes = encoder.token_bytes
    return DecodedCharacters(encoder, prompt) if token_bytes is None else ByteCharacters(token_bytes)


class ByteCharacters:
    """Of a tokenizer whose tokens are bytes. A token of whole characters after whole characters is only looked up."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._held = ""  # U+FFFD of bytes that are no character, or of the text itself
        self._begun = b""  # of a character

    def push(self, token: int) -> str:
        """See `Characters`."""
        added = self._token_bytes[token]
        if isinstance(added, str):
            if not self._begun and not self._held:
                return added
            added = added.encode()
        added = self._begun + added
        text, read = utf_8_decode(added, "replace", False)
        self._begun = added[read:]
        text = self._held + text
        room = _CHARACTER_BYTES - 1 - bool(self._begun)
        held = min(len(text) - len(text.rstrip(UNFINISHED)), room)
        certain = text[: len(text) - held]
        self._held = text[len(certain) :]
        return certain

    def finish(self) -> str:
        """See `Characters`."""
        rest = self._held + (UNFINISHED if self._begun else "")
        self._held, self._begun = "", b""
        return rest


class DecodedCharacters:
    """Of any tokenizer, by decoding the last few tokens together again with each new one.

    `_window` holds these tokens and `_given` what of their text was handed out. The first `_settled` of them are done
    with; they are there for what comes after them (a space between words).
    """

    def __init__(self, encoder: TextEncoder, prompt: Sequence[int]) -> None:
        self._encoder = encoder
        self._window = _context(encoder, prompt)
        self._settled = len(self._window)
        self._given = encoder.decode(self._window)

    def push(self, token: int) -> str:
        """See `Characters`."""
        if self._encoder.leaves_out(token):
            return ""
        self._window.append(token)
        text = self._encoder.decode(self._window)
        if not text.startswith(self._given):
            if text.endswith(UNFINISHED) and len(self._window) - self._settled < _CHARACTER_BYTES:
                return ""
            text = self._without_settled()
        unfinished = min(len(text) - len(text.rstrip(UNFINISHED)), _CHARACTER_BYTES - 1)
        certain = text[: max(len(text) - unfinished, len(self._given))]
        new = certain[len(self._given) :]
        self._given = certain
        if new and certain == text:
            self._drop(self._settled, 0)
            self._settled = len(self._window)
        elif len(self._window) > _WINDOW_TOKENS:  # nothing but unfinished characters for so long
            self._drop(_WINDOW_TOKENS // 2, len(text) - len(certain))
        return new

    def finish(self) -> str:
        """See `Characters`."""
        text = self._encoder.decode(self._window)
        if not text.startswith(self._given):
            text = self._without_settled()
        new = text[len(self._given) :]
        self._given = text
        return new

    def _without_settled(self) -> str:
        """The text of the window alone, after the settled tokens were dropped from it.

        A tokenizer with a token for each byte (ByteFallback) takes a run of them for invalid as a whole if it is so
        anywhere: a character that follows another and is not finished takes back the text of the first.
        """
        self._window = self._window[self._settled :]
        self._settled = 0
        self._given = ""
        return self._encoder.decode(self._window)

    def _drop(self, count: int, held: int) -> None:
        """Drop the first `count` tokens of the window; the last `held` characters are not handed out."""
        self._window = self._window[count:]
        self._settled = max(self._settled - count, 0)
        text = self._encoder.decode(self._window)
        self._given = text[: len(text) - held]


def _context(encoder: TextEncoder, prompt: Sequence[int]) -> list[int]:
    """The last tokens of the prompt that have a text of whole characters; special ones have none."""
    context: list[int] = []
    for token in reversed(prompt):
        if len(context) == _CONTEXT_TOKENS:
            break
        if not encoder.leaves_out(token):
            context.insert(0, token)
    while context and UNFINISHED in encoder.decode(context):
        del context[0]
    return context

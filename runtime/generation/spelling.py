"""Special tokens that a user's text only spells: they stay text beside those of the chat template.

A chat template gives one text, in which nothing tells a user's "<|im_start|>" from the template's. So what users spell
is broken by a mark before it is rendered. A tokenizer that knows the mark as a token cuts the text there, and the mark
is left out. Where nobody spells a special token, all is as without.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from stageline.models.tokenizer import TextEncoder

_Value = TypeVar("_Value")


class Spelling:
    """Breaks what is spelt, and makes tokens of texts with broken spellings. Several threads may use it."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        # Nobody can guess it, and no special token is spelt in it: 150 bits in characters for private use.
        self._mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(12))
        # One of a single character has no inside to break.
        names = sorted((name for name in encoder.special_texts if len(name) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def broken(self, value: _Value) -> _Value:
        """The same value (messages, tools, ... as JSON has them) with each special token in its texts broken."""
        if self._special is None:
            return value
        broken: _Value = self._broken(value, self._special)
        return broken

    def _broken(self, value: Any, special: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            while special.search(value):  # those that overlap are left to the next round
                value = special.sub(lambda found: found[0][:1] + self._mark + found[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self._broken(key, special): self._broken(one, special) for key, one in value.items()}
        if isinstance(value, Sequence):
            return [self._broken(one, special) for one in value]
        return value

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that holds what `broken` gave; nothing is added to it."""
        if self._mark not in text:
            return self._encoder.ids(text, special=False)
        encoder, mark = self._with_mark
        return [token for token in encoder.ids(text, special=False) if token != mark]

    @cached_property
    def _with_mark(self) -> tuple[TextEncoder, int]:
        return self._encoder.with_special(self._mark)

"""A completion before a `suffix`: prompts of the tokens that models which fill in the middle are trained with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from stageline.models.tokenizer import TextEncoder

_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek-Coder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
)
"""What stands before the prefix, before the suffix and before the middle, as the models' papers and cards have it."""
_MARK = "\u263a"  # before a text in the midst of another; CodeLlama's own code uses it


@dataclass(frozen=True)
class FillIn:
    """The three tokens of a tokenizer."""

    encoder: TextEncoder
    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, encoder: TextEncoder) -> Self | None:
        """None where it has no such tokens."""
        for names in _FAMILIES:
            ids = [encoder.token(name) for name in names]
            if None not in ids:
                return cls(encoder, *(number for number in ids if number is not None))
        return None

    def ids(self, prompt: str | Sequence[int], suffix: str) -> list[int]:
        """The prompt of which the continuation stands between `prompt` and `suffix`. RequestError for what is no text.

        What the tokenizer adds to a text (a begin token) stands before all.
        """
        before = self.encoder.ids(prompt, special=False) if isinstance(prompt, str) else prompt
        return [*self.encoder.ids(""), self.prefix, *before, self.suffix, *self._inner(suffix), self.middle]

    def _inner(self, text: str) -> list[int]:
        """The tokens of a text that begins no line: some tokenizers put a blank before the first word of a text."""
        if self.encoder.token_bytes is not None or not text:
            return self.encoder.ids(text, special=False)
        ids, pieces = self.encoder.pieces(_MARK + text, special=False)
        ends = list(accumulate(map(len, pieces)))
        if 1 not in ends:  # no token ends with the mark
            return self.encoder.ids(text, special=False)
        return ids[ends.index(1) + 1 :]

"""Drafts of a row's next tokens from its own text: what followed the last time that its last tokens stood there.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). How often it is right is learnt from every
token, whether a step has computed a draft or not.
"""

from collections.abc import Iterator, Sequence

SIZE = 3
"""Tokens that must be alike before there is a draft."""
_LONGER, _LONG = 6, 12  # alike: what follows so many has a rate of its own
_PRIOR = ((1.0, 1.5), (2.0, 1.0), (4.0, 0.5))  # hits and misses, as if they had been seen
_FADE = 0.97  # what was seen counts for so much less with each later token


class Lookup:
    """Drafts for one row, whose `tokens` are read as they grow."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._read = 0
        self._found: dict[tuple[int, ...], int] = {}  # SIZE tokens -> the place after them
        self._next: int | None = None  # the place of what the next token should be like
        self._alike = 0  # tokens before that place that are the row's last ones, as far as they were compared
        self._rates = [list(prior) for prior in _PRIOR]

    def read(self) -> None:
        """Learn from the tokens that are new."""
        tokens = self._tokens
        for place in range(self._read, len(tokens)):
            if self._next is not None:
                right = tokens[self._next] == tokens[place]
                rate = self._rates[_kind(self._alike)]
                rate[0] = _FADE * rate[0] + right
                rate[1] = _FADE * rate[1] + (not right)
                self._next, self._alike = (self._next + 1, self._alike + 1) if right else (None, 0)
            if place + 1 < SIZE:
                continue
            last = tuple(tokens[place + 1 - SIZE : place + 1])
            if self._next is None:
                self._next, self._alike = self._found.get(last), SIZE
            self._found[last] = place + 1
        self._read = len(tokens)

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens, if what has come before comes again. Only where `chances` gives any."""
        assert self._next is not None
        drafted: list[int] = []
        for place in range(self._next, self._next + count):
            # Beyond the end is the draft itself: a text that repeats itself goes on doing so.
            known = place < len(self._tokens)
            drafted.append(self._tokens[place] if known else drafted[place - len(self._tokens)])
        return drafted

    def chances(self) -> Iterator[float]:
        """How likely it is that the first token of a draft is right, that the first two are, and so on without end;
        nothing where there is no draft."""
        if self._next is None:
            return
        chance, alike = 1.0, self._alike
        while True:
            hits, misses = self._rates[_kind(alike)]
            chance *= hits / (hits + misses)
            alike += 1
            yield chance


def _kind(alike: int) -> int:
    return (alike >= _LONGER) + (alike >= _LONG)

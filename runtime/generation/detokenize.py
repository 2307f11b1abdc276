"""Tokens to text as they come: whole characters only, and nothing of a text that ends the choice."""

from collections.abc import Sequence

from stageline.models.tokenizer import TextEncoder
from stageline.runtime.generation.characters import characters_of


class TextStream:
    """The text of one choice, piece by piece, up to a stop.

    The pieces joined are what the tokens add to the decoded `prompt`, cut before whichever of `stop` is complete first:
    many decoders drop the space before the first token of a text, which that of a continuation is not. The text of the
    first `min_tokens` tokens is not searched for stops. A token costs the same however long the text is.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
        shown: Sequence[int] = (),
    ) -> None:
        """`shown`: special tokens of which the text has the spelling."""
        self.stopped = False
        """Whether a stop was found; the text has ended before it."""
        self.added = ""
        """What the tokens of the last `push` or `finish` add to the text, whether it is held back, given or stopped."""
        self.may_stop = bool(stop)
        """Whether it looks for stops."""
        self._characters = characters_of(encoder, prompt)
        self._spelt = dict(zip(shown, encoder.names(shown), strict=True))
        self._stops = [_Stop(text) for text in stop]
        self._beginnings = frozenset(text[0] for text in stop)
        self._unsearched = min_tokens
        self._held = ""  # the beginning of a stop, perhaps

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens and give the text that is certain now; none once stopped."""
        if not self._stops:
            push = self._pushed if self._spelt else self._characters.push
            self.added = push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))
            return self.added
        pieces = []
        self.added = ""
        for token in token_ids:
            text = self._pushed(token)
            self.added += text
            if self._unsearched > 0:
                self._unsearched -= 1
                pieces.append(text)
            else:
                pieces.append(self._before_stop(text))
        return "".join(pieces)

    def finish(self) -> str:
        """Give what was held back: no token follows. Unfinished characters come as U+FFFD."""
        self.added = self._characters.finish()
        text = self._before_stop(self.added)
        held, self._held = self._held, ""
        return text + held

    def _pushed(self, token: int) -> str:
        if token in self._spelt:
            return self._characters.finish() + self._spelt[token]
        return self._characters.push(token)

    def _before_stop(self, text: str) -> str:
        """What of the text held back and `text` is certain not to be part of a stop."""
        if self.stopped:
            return ""
        if not self._held and self._beginnings.isdisjoint(text):
            return text
        whole = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = [len(stop.text) for stop in self._stops if stop.completed_by(character)]
            if found:
                self.stopped = True
                self._held = ""
                return whole[: end - max(found)]
        certain = len(whole) - max((stop.matched for stop in self._stops), default=0)
        self._held = whole[certain:]
        return whole[:certain]


class _Stop:
    """One text to find, character by character, with the automaton of Knuth, Morris and Pratt."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Number of last characters that are the beginning of the text."""
        self._shorter = [0] * (len(text) + 1)  # of a match of i characters: the next shorter match in its end
        for end in range(1, len(text)):
            self._shorter[end + 1] = self._extended(self._shorter[end], text[end])

    def completed_by(self, character: str) -> bool:
        """Take the next character; whether the text is complete with it."""
        self.matched = self._extended(self.matched, character)
        return self.matched == len(self.text)

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)

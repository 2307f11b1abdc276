"""Tokens to text as they come: whole characters only, and nothing of a text that ends the choice.

tokenizers has a DecodeStream; as of 0.23 it raises where invalid bytes follow a character written in bytes
(`<0xC3><0xA9><0xF0>` and then a letter), holds invalid bytes back for ever, and then takes longer with each token.
"""

from collections.abc import Sequence

from stageline.models.tokenizer import TextEncoder

_UNFINISHED = "\ufffd"  # what decoding makes of bytes that are not a whole character, or not yet
_CHARACTER_BYTES = 4  # the most a character has in UTF-8; a token has at least one
_WINDOW_TOKENS = 16
_CONTEXT_TOKENS = 8


class TextStream:
    """The text of one choice, piece by piece, up to a stop.

    The pieces joined are what the tokens add to the decoded `prompt`, cut before whichever of `stop` is complete first:
    many decoders drop the space before the first token of a text, which that of a continuation is not. The text of the
    first `min_tokens` tokens is not searched for stops. A token costs the same however long the text is.
    """

    def __init__(
        self, encoder: TextEncoder, stop: Sequence[str] = (), min_tokens: int = 0, prompt: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        """Whether a stop was found; the text has ended before it."""
        self.added = ""
        """What the tokens of the last `push` or `finish` add to the text, whether it is held back, given or stopped."""
        self._characters = _Characters(encoder, prompt)
        self._stops = [_Stop(text) for text in stop]
        self._unsearched = min_tokens
        self._held = ""  # the beginning of a stop, perhaps

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens and give the text that is certain now; none once stopped."""
        pieces = []
        self.added = ""
        for token in token_ids:
            text = self._characters.push(token)
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

    def _before_stop(self, text: str) -> str:
        """What of the text held back and `text` is certain not to be part of a stop."""
        if self.stopped:
            return ""
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


class _Characters:
    """Incremental decoding, by decoding the last few tokens together again with each new one.

    `_window` holds these tokens and `_given` what of their text was handed out. The first `_settled` of them are done
    with; they are there for what comes after them (a space between words).
    """

    def __init__(self, encoder: TextEncoder, prompt: Sequence[int]) -> None:
        self._encoder = encoder
        self._window = _context(encoder, prompt)
        self._settled = len(self._window)
        self._given = encoder.decode(self._window)

    def push(self, token: int) -> str:
        """The text that is certain with this token: all but a character at the end that may be unfinished."""
        if self._encoder.leaves_out(token):
            return ""
        self._window.append(token)
        text = self._encoder.decode(self._window)
        if not text.startswith(self._given):
            if text.endswith(_UNFINISHED) and len(self._window) - self._settled < _CHARACTER_BYTES:
                return ""
            text = self._without_settled()
        unfinished = min(len(text) - len(text.rstrip(_UNFINISHED)), _CHARACTER_BYTES - 1)
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
        """The rest of the text."""
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
    while context and _UNFINISHED in encoder.decode(context):
        del context[0]
    return context


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

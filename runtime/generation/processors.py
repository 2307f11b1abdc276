"""What is done to a row's logits before a token is chosen, in the order of transformers' `generate`."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from stageline.runtime.generation.settings import Settings


class Processors:
    """Biases, penalties and bans of one row, which remember the tokens that they depend on."""

    def __init__(self, settings: Settings, vocabulary: int, prompt: Sequence[int], end_ids: Sequence[int]) -> None:
        """`prompt`: token ids below `vocabulary`, the width of the logits; ids above it in `settings` say nothing."""

        def known(tokens: Sequence[int]) -> NDArray[np.int64]:
            return np.array([token for token in dict.fromkeys(tokens) if token < vocabulary], np.int64)

        self._settings = settings
        self._drawn = 0
        self._ends = known([*end_ids, *settings.stop_token_ids])
        self._suppressed = known(settings.suppress_tokens)
        self._suppressed_first = known(settings.begin_suppress_tokens)
        biases = {ids: np.float32(bias) for ids, bias in settings.sequence_bias if max(ids) < vocabulary}
        self._biases = tuple(biases.items())
        # transformers lets an end token end a text even if it is one of the bad words.
        ends = {(end,) for end in end_ids}
        self._bad_words = tuple(ids for ids in settings.bad_words_ids if ids not in ends and max(ids) < vocabulary)
        self._penalised = (
            settings.repetition_penalty != 1 or settings.presence_penalty != 0 or settings.frequency_penalty != 0
        )
        self._counts = np.zeros(vocabulary if self._penalised else 0, np.int32)  # how often each token was drawn
        self._in_prompt = np.zeros(len(self._counts), np.bool_)
        if self._penalised:
            self._in_prompt[np.asarray(prompt, np.int64)] = True
        size = settings.no_repeat_ngram_size
        self._reads_tokens = size > 0 or any(len(ids) > 1 for ids in (*biases, *self._bad_words))
        self._tokens = list(prompt) if self._reads_tokens else []
        self._followers: dict[tuple[int, ...], list[int]] = {}  # N - 1 tokens -> those that have come after them
        for end in range(size, len(self._tokens) + 1) if size else ():
            self._note_ngram(end)
        always = self._penalised or size > 0 or bool(biases or self._bad_words or len(self._suppressed))
        first = int(len(self._suppressed_first) > 0)
        self._idle_from = math.inf if always else max(first, settings.min_tokens)
        self.idle = self._idle_from == 0
        """Whether they leave the logits of the next token as they are, and of all that follow."""

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The row's logits [vocabulary] after all of them: tokens that may not be drawn are at minus infinity. A new
        array, or `logits` itself where nothing changes."""
        if self.idle:
            return logits
        scores = logits.copy()
        settings = self._settings
        total: dict[int, np.float32] = {}
        for ids, bias in self._biases:
            if self._ends_with(ids[:-1]):
                total[ids[-1]] = total.get(ids[-1], np.float32(0)) + bias
        for token, bias in total.items():
            scores[token] += bias
        if settings.repetition_penalty != 1:
            seen = np.flatnonzero(self._in_prompt | (self._counts > 0))
            values = scores[seen]
            penalty = np.float32(settings.repetition_penalty)
            scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._penalised:
            drawn = np.flatnonzero(self._counts)
            scores[drawn] -= settings.presence_penalty + settings.frequency_penalty * self._counts[drawn]
        size = settings.no_repeat_ngram_size
        if 0 < size <= len(self._tokens) + 1:
            scores[self._followers.get(tuple(self._tokens[len(self._tokens) + 1 - size :]), [])] = -np.inf
        for ids in self._bad_words:
            if self._ends_with(ids[:-1]):
                scores[ids[-1]] = -np.inf
        if self._bars_ends:
            scores[self._ends] = -np.inf
        scores[self._suppressed] = -np.inf
        if self._drawn == 0:
            scores[self._suppressed_first] = -np.inf
        return scores

    def record(self, token: int) -> None:
        """Take the token for drawn; only while they are not idle need they know."""
        self._drawn += 1
        self.idle = self._drawn >= self._idle_from
        if self._penalised:
            self._counts[token] += 1
        if self._reads_tokens:
            self._tokens.append(token)
            if 0 < self._settings.no_repeat_ngram_size <= len(self._tokens):
                self._note_ngram(len(self._tokens))

    @property
    def _bars_ends(self) -> bool:
        return self._drawn < self._settings.min_tokens

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        return not ids or tuple(self._tokens[-len(ids) :]) == ids

    def _note_ngram(self, end: int) -> None:
        """Note the tokens up to place `end`, which is not part of them."""
        *before, last = self._tokens[end - self._settings.no_repeat_ngram_size : end]
        self._followers.setdefault(tuple(before), []).append(last)

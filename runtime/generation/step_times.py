"""How long steps take, learnt while they run: those that decode by their tokens, and what tokens of prompts add."""

import sys

from stageline.runtime.generation.steps import Step

_FADE = 0.98  # a step that was seen counts for so much less with each later one
_TOKEN = 0.1  # what another token adds to the time of a step of one, before anything was measured
_TOKEN_WEIGHT = 4.0
_FLAT_WEIGHT = 64.0**2  # that tokens before cost nothing: as if a step so many tokens from the others had said so
_LEAST = 0.1  # of the time of a step with prompts, what these take at least


class Line:
    """The line through points (x, y) lately; both at least 0, as are its slope and what it is at 0."""

    def __init__(self) -> None:
        self.weight = self._x = self._y = self._squares = self._products = 0.0

    def note(self, x: float, y: float) -> None:
        """Another point."""
        self.weight = _FADE * self.weight + 1
        self._x = _FADE * self._x + x
        self._y = _FADE * self._y + y
        self._squares = _FADE * self._squares + x * x
        self._products = _FADE * self._products + x * y

    @property
    def mean(self) -> tuple[float, float]:
        """The middle of the points, if there are any."""
        return self._x / self.weight, self._y / self.weight

    def fit(self, expected: float, weight: float) -> tuple[float, float]:
        """What it is at 0, and its slope: by least squares, with a slope that is `expected` as if points of a squared
        distance of `weight` had said so."""
        x, y = self.mean
        spread = max(0.0, self._squares - x * self._x)
        slope = (self._products - y * self._x + weight * expected) / (spread + weight)
        slope = max(slope, 0.0)
        if x:
            slope = min(slope, y / x)
        return y - slope * x, slope


class StepTimes:
    """Of one pipeline's steps; those of prompts in mixed steps are what is beyond the time of what decodes beside."""

    def __init__(self) -> None:
        self._decoding = Line()  # tokens, drafted ones included -> seconds
        self._reading = Line()  # tokens before one of a prompt -> seconds of it

    def note(self, step: Step, seconds: float) -> None:
        """A step took so long, in all stages together."""
        rows = step.arrays
        if step.kind == "decode":
            self.note_decoding(int(rows.counts.sum()), seconds)
            return
        read = [
            (count, start + count / 2)
            for continuation, start, count in zip(
                rows.continuations, rows.starts.tolist(), rows.counts.tolist(), strict=True
            )
            if start < continuation.prefill_length
        ]
        tokens = sum(count for count, _ in read)
        beside = self.decoding(int(rows.counts.sum()) - tokens) if self._decoding.weight else 0.0
        past = sum(count * middle for count, middle in read) / tokens
        self._reading.note(past, max(seconds - beside, _LEAST * seconds) / tokens)

    def note_decoding(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens that all decode, drafted ones included, took so long."""
        self._decoding.note(tokens, seconds)

    def line(self) -> tuple[float, float]:
        """Seconds of a decoding step without tokens, and of each token; in other units before the first step."""
        if not self._decoding.weight:
            return 1 - _TOKEN, _TOKEN
        tokens, seconds = self._decoding.mean
        return self._decoding.fit(_TOKEN * seconds / (1 + _TOKEN * (tokens - 1)), _TOKEN_WEIGHT)

    def decoding(self, tokens: int) -> float:
        """Seconds of a decoding step; 0 before the first."""
        base, each = self.line() if self._decoding.weight else (0.0, 0.0)
        return base + each * tokens

    def readable(self, seconds: float, past: int) -> int:
        """How many tokens of a prompt, after `past` ones, take so long; no bound before the first were read."""
        if not self._reading.weight:
            return sys.maxsize
        first, later = self._reading.fit(0.0, _FLAT_WEIGHT)
        tokens = seconds / max(first + later * past, sys.float_info.min)
        return int(max(0.0, seconds / max(first + later * (past + tokens / 2), sys.float_info.min)))

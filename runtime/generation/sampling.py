"""Choosing the next token of every row of a batch from the model's logits.

What a row draws depends on its own logits, settings and generator alone, never on the rows beside it. A row that needs
no feature does not pay for it: a batch that is greedy throughout costs one argmax.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from stageline.models.errors import EngineError, StructureError
from stageline.runtime.engines.lowering.draw_graph import CANDIDATES
from stageline.runtime.generation.processors import Processors
from stageline.runtime.generation.reasoned import RowMatcher
from stageline.runtime.generation.request import TokenLogprob
from stageline.runtime.generation.settings import Settings

_COLUMNS = 1024


@dataclass(frozen=True)
class Drawn:
    """The next token of a row; `logprob` where the row's Sampling asks for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class Row:
    """One choice of a request, as sampling sees it: its settings, its generator and the tokens it has so far."""

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        prompt: Sequence[int] = (),
        end_ids: Sequence[int] = (),
        choice: int = 0,
        matcher: RowMatcher | None = None,
    ) -> None:
        """`prompt`: token ids below `vocabulary`, the width of the logits. `end_ids`: tokens that end a text, which are
        not drawn before `min_tokens`. `choice`: which of the n, counted from 0. `matcher`: where its text stands in the
        structure that it must have; the Row's own."""
        self.settings = settings
        self._greedy = settings.temperature == 0
        self.drawn = 0
        """Tokens drawn so far."""
        self._choice = choice
        self._uniform: deque[float] = deque()  # of the next tokens, as far as they were asked for
        self.processors = Processors(settings, vocabulary, prompt, end_ids)
        self.matcher = matcher

    @cached_property
    def _generator(self) -> np.random.Generator:
        """Made when it is first asked for, which greedy rows never do."""
        seed = self.settings.seed
        return np.random.default_rng(None if seed is None else seed + self._choice)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the next token is the raw logits' argmax."""
        return self._greedy and self.processors.idle and self.matcher is None

    @property
    def complete(self) -> bool:
        """Whether the structure that its text must have allows nothing more."""
        return self.matcher is not None and self.matcher.complete

    def device_settings(self, ahead: int) -> tuple[float, ...] | None:
        """What a `Sampler` needs to draw the token `ahead` tokens after the next (see `lowering.draw_graph.SETTINGS`).

        None if only the host can, for penalties, bans, structures and log probabilities."""
        settings = self.settings
        if not self.processors.idle or settings.logprobs is not None or settings.top_k > CANDIDATES:
            return None
        if self.matcher is not None:
            return None
        if settings.temperature == 0:
            return 1.0, 0.0, 1.0, 0.0, 0.0, 1.0
        cuts = float(settings.top_k), settings.top_p, settings.min_p
        return 1 / settings.temperature, *cuts, self._uniform_ahead(ahead), 0.0

    def choose(self, logits: NDArray[np.float32]) -> int | None:
        """The next token from the row's logits [vocabulary], which are not changed. None if no token is left."""
        scores = self.processors.apply(logits)
        if self.matcher is not None:
            scores = self.matcher.masked(scores)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            return None
        if self._greedy:
            return best
        # One uniform number, looked up in the weights cumulated in the order of the ids. That order does not depend on
        # the scores, so a rounding difference between two runs moves the borders between tokens by as little.
        ids, weights = weigh(scores, self.settings)
        cumulated = np.cumsum(weights)
        total = cumulated[-1]
        place = np.searchsorted(cumulated, self._take_uniform() * total, side="right")
        last = np.searchsorted(cumulated, total)  # the last token that weighs anything, should the product round up
        return int(ids[min(place, last)])

    def record(self, token: int) -> None:
        """Take the token for drawn."""
        self.drawn += 1
        if not self.processors.idle:
            self.processors.record(token)
        if self.matcher is not None:
            self.matcher.take(token)

    def record_drawn(self, token: int) -> None:
        """Take a token that a device has drawn, by `device_settings`."""
        if not self._greedy:
            self._take_uniform()
        self.record(token)

    def _take_uniform(self) -> float:
        number = self._uniform_ahead(0)
        self._uniform.popleft()
        return number

    def _uniform_ahead(self, ahead: int) -> float:
        """The uniform number that decides the next token, or the one `ahead` tokens later."""
        while len(self._uniform) <= ahead:
            self._uniform.append(self._generator.random())
        return self._uniform[ahead]


def draw(logits: NDArray[np.float32], rows: Sequence[Row]) -> list[int | EngineError]:
    """The next token of each row, recorded in it.

    Args:
        logits: float32 [rows, vocabulary]; they are read only.
        rows: what each row of the logits belongs to; no Row twice.

    Returns:
        One result per row. For a row whose logits hold NaN or +infinity, or leave no token, it is an EngineError, which
        is returned and not raised: that row stays as it was, and the others have their tokens.
    """
    likeliest = logits.argmax(axis=1)
    # argmax takes a NaN for the largest: so one look at the largest finds NaN, +infinity and rows of -infinity.
    largest = logits[np.arange(len(rows)), likeliest].tolist()
    results: list[int | EngineError] = likeliest.tolist()
    for number, (row, peak) in enumerate(zip(rows, largest, strict=True)):
        if not (row.takes_the_likeliest and math.isfinite(peak)):
            results[number] = _chosen(row, logits[number], peak)
        if type(result := results[number]) is int:
            row.record(result)
    return results


def _chosen(row: Row, logits: NDArray[np.float32], peak: float) -> int | EngineError:
    if not math.isfinite(peak):
        return not_finite(f"token {row.drawn}", peak)
    token = row.choose(logits)
    if token is None and row.matcher is not None and row.matcher.error:
        return StructureError(
            f"the structure cannot be followed beyond token {row.drawn}: {row.matcher.error}; ask for a simpler one"
        )
    if token is None:
        structure = "" if row.matcher is None else "the structure, "
        return EngineError(
            f"no token is left for token {row.drawn}: {structure}min_tokens ({row.settings.min_tokens}), "
            "bad_words_ids, suppress_tokens or no_repeat_ngram_size bar all that the model allows; loosen them"
        )
    return token


def not_finite(token: str, peak: float) -> EngineError:
    """The error of logits whose largest is no number that a model should give."""
    return EngineError(
        f"the largest logit of {token} is {peak}: numbers overflowed or weights are damaged; "
        "export with --dtype float32, and compare with: stageline verify"
    )


def sample(logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Drawn | EngineError]:
    """As `draw`, and with each token its log probability where the row's Sampling asks for it."""
    return [
        drawn
        if isinstance(drawn, EngineError)
        else Drawn(drawn, None if (count := row.settings.logprobs) is None else logprob(logits[number], drawn, count))
        for number, (row, drawn) in enumerate(zip(rows, draw(logits, rows), strict=True))
    ]


def weigh(scores: NDArray[np.float32], settings: Settings) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that temperature (above 0), top_k, top_p and min_p leave of one row's scores [vocabulary].

    Returns their ids in rising order and, of the same length, weights in proportion to their probabilities (the
    likeliest weighs 1; some may weigh 0). Ties with the k-th token stay, as in transformers' TopKLogitsWarper.
    """
    best = scores.max()
    if 0 < settings.top_k < len(scores):
        ids = _top(scores, settings.top_k)
        scores = scores[ids]
    else:
        ids = np.arange(len(scores))
    with np.errstate(over="ignore"):  # to minus infinity, at a temperature near 0
        weights = np.exp(np.subtract(scores, best, dtype=np.float64) / settings.temperature)
    if settings.top_p < 1:
        kept = _nucleus(weights, settings.top_p)
        ids, weights = ids[kept], weights[kept]
    if settings.min_p > 0:
        weights[weights < settings.min_p] = 0
    return ids, weights


def _top(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Which of the scores [vocabulary] are the `count` largest, and those equal to the last of them; in rising order.

    They are none below the `count`-th of the largest of each of some columns, which is quickly found.
    """
    columns = max(_COLUMNS, 4 * count)
    rows = len(scores) // columns
    if rows < 2:
        return np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    largest = scores[: rows * columns].reshape(rows, columns).max(axis=0)
    ids = np.flatnonzero(scores >= np.partition(largest, -count)[-count])
    left = scores[ids]
    found: NDArray[np.int64] = ids[left >= np.partition(left, -count)[-count]]
    return found


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Where the smallest set of likeliest tokens lies that weighs `top_p` of the sum; at least one, in rising order.

    Of equally likely tokens at the edge, the lowest ids stay (transformers' TopPLogitsWarper leaves that open).
    """
    total = weights.sum()
    # Tokens that each weigh less than this weigh less than 1 - top_p together: the nucleus is among the others.
    candidates = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    likely = weights[candidates]
    falling = np.sort(likely)[::-1]
    count = min(int(np.searchsorted(np.cumsum(falling), top_p * total)) + 1, len(falling))
    kept: NDArray[np.int64] = candidates[_largest(likely, falling[count - 1], count)]
    return kept


def _largest(values: NDArray[np.floating], edge: np.floating, count: int) -> NDArray[np.bool_]:
    """Which are the `count` largest, the smallest of which is `edge`; the first of those equal to it."""
    kept = values > edge
    kept[np.flatnonzero(values == edge)[: count - int(kept.sum())]] = True
    return kept


def logprob(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """The log probability of `token` and the `count` likeliest, of equally likely ones the lowest ids first."""
    peak = logits.max()
    weights = np.subtract(logits, peak, dtype=np.float64)
    total = float(peak) + float(np.log(np.exp(weights, out=weights).sum()))
    top: list[int] = []
    if count:
        ids = _top(logits, min(count, len(logits)))
        top = ids[np.argsort(-logits[ids], kind="stable")][:count].tolist()
    return TokenLogprob(token, float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in top))

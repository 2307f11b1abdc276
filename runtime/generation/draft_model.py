"""Drafts by a small model of the same vocabulary: a bundle of its own, which runs on the same cores before each step.

Each row of the pipeline has a row in the small model's caches. Before a step with drafts the small model reads what is
new of the row, then draws its own likeliest tokens, one after the other, of all rows at once. They are guesses like
those of prompt lookup, and kept as far as the large model draws the same: no token is another.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Self

import numpy as np
from stageline.models.errors import EngineError, RequestError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import CACHED_INPUTS, ROW_LENGTHS
from stageline.runtime.engines import CacheSize, Engine, PackedRows, Value
from stageline.runtime.generation.lookup import Lookup
from stageline.runtime.generation.speculation import Speculation
from stageline.runtime.generation.step_times import Line, StepTimes
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.options import DRAFTS, PipelineOptions
from stageline.runtime.stages.lanes import Lanes
from stageline.runtime.stages.opening import Opener
from stageline.runtime.stages.route import route

_CHUNK = 64  # tokens of a row that the small model reads at a time: the next step waits for them
_PRIOR = 0.7  # how likely a guess is right, before any was seen
_WEIGHT = 2.0  # tokens of a row that count as much as what was seen of others before it
_FADE = 0.97
_HOPE = 0.01  # of `_PRIOR`, for each row that begins: a model that was never right is tried again in a hundred rows
_log = logging.getLogger("stageline.draft")


class DraftRow(Lookup):
    """What the small model has of one row, whose `tokens` it reads as they grow."""

    def __init__(self, tokens: Sequence[int], chance: float, learn: Callable[[bool], None]) -> None:
        """`chance`: how likely a guess is right, by what others have learnt; it tells them by `learn`."""
        self.tokens = tokens
        self.slot: int | None = None
        self.held: list[int] = []
        """The tokens in its slot."""
        self.drafted: list[int] = []
        """What was drafted last, to go after the first `known` tokens."""
        self.known = 0
        self._hits, self._misses = _WEIGHT * chance, _WEIGHT * (1 - chance)
        self._learn = learn

    def read(self) -> None:
        """Learn what became of the last draft, and let go of what was wrong."""
        for token, drawn in zip(self.drafted, self.tokens[self.known :], strict=False):
            right = token == drawn
            self._hits, self._misses = _FADE * self._hits + right, _FADE * self._misses + (not right)
            self._learn(right)
            if not right:
                break
        self.drafted = []
        place = min(self.known, len(self.held))
        while place < min(len(self.held), len(self.tokens)) and self.held[place] == self.tokens[place]:
            place += 1
        del self.held[min(place, len(self.tokens) - 1) :]
        self.known = len(self.tokens)

    def chances(self) -> Iterator[float]:
        """See `Lookup.chances`: before the small model is asked."""
        chance = 1.0
        while True:
            chance *= self._hits / (self._hits + self._misses)
            yield chance

    def draft(self, count: int) -> list[int]:
        """See `Lookup.draft`."""
        return self.drafted[:count]


class DraftModel(Speculation):
    """Speculation by a small model on `lanes`, which it owns until `close`, with caches of size `cache`. For the
    driver's thread."""

    def __init__(
        self, times: StepTimes, lanes: Lanes, stages: Sequence[tuple[Sequence[str], Sequence[str]]], cache: CacheSize
    ) -> None:
        super().__init__(times)
        self._lanes = lanes
        self._hops = route(stages, (*CACHED_INPUTS, ROW_LENGTHS), ["logits"])
        self._slots: dict[int, DraftRow | None] = dict.fromkeys(range(cache.slots))  # the one used last at the end
        self._chunk = min(_CHUNK, cache.chunk)
        self._steps = Line()  # rows -> seconds of a step of a token each
        self._failed = False
        self._chance = _PRIOR

    @classmethod
    def open(cls, path: Path, options: PipelineOptions, size: CacheSize, model: TextModel, times: StepTimes) -> Self:
        """Open the bundle at `path` for drafts of `model`, whose caches have this size, with the engine and threads of
        its `options`.

        RequestError where it is none for that, BundleError and EngineError as a pipeline's.
        """
        bundle = Bundle.open(path)
        if not bundle.manifest.cached:
            raise RequestError(f"draft bundle {path} does not generate; give one that does")
        small = TextModel.of(bundle)
        if _words(small) != _words(model):
            raise RequestError(f"draft bundle {path} has another vocabulary; give one of the same tokenizer")
        if small.row_scaling is not None:
            raise RequestError(f"draft bundle {path} has keys that depend on a row's length, which drafts cannot have")
        if small.max_positions is not None and small.max_positions < size.capacity:
            raise RequestError(
                f"draft bundle {path} can place {small.max_positions} tokens; lower capacity, which is {size.capacity}"
            )
        settings = PipelineOptions(options.engine, threads=options.threads, slots=size.slots, capacity=size.capacity)
        opener = Opener(bundle, settings)
        cache = opener.cache
        assert cache is not None
        stages = opener.on_disk()
        lanes = Lanes(stages.stages, stages.threads, stages.devices)
        if not lanes.packs:
            lanes.close()
            raise RequestError(f"draft bundle {path} cannot pack tokens in {options.engine}; use another engine")
        return cls(times, lanes, [(stage.inputs, stage.outputs) for stage in stages.stages], cache)

    def begin(self, tokens: Sequence[int]) -> Lookup:
        """See `Speculation.begin`."""
        self._chance += _HOPE * (_PRIOR - self._chance)
        return DraftRow(tokens, self._chance, self._learn)

    def drafting(self, rows: int) -> float:
        """See `Speculation.drafting`."""
        if not self._steps.weight:
            return 0.0
        base, each = self._steps.fit(0.0, 1.0)
        return base / rows + each

    def counts(self, rows: Sequence[tuple[Lookup | None, int]]) -> list[int]:
        """See `Speculation.counts`. The drafts are made here."""
        counts = [0] * len(rows) if self._failed else super().counts(rows)
        pairs = [(row, count) for (row, _), count in zip(rows, counts, strict=True)]
        wanted = {row: count for row, count in pairs if count and isinstance(row, DraftRow)}
        try:
            self._draft(wanted)
        except EngineError as error:
            _log.warning("there are no drafts any more: %s", error)
            self._failed = True
        return [0 if row is None else len(row.draft(count)) for row, count in pairs]

    def close(self) -> None:
        """See `Speculation.close`."""
        self._lanes.close()

    def _learn(self, right: bool) -> None:
        self._chance = _FADE * self._chance + (1 - _FADE) * right

    def _draft(self, wanted: Mapping[DraftRow, int]) -> None:
        """Draft so many tokens of each row, where the small model has read the others."""
        for row in wanted:
            self._place(row, wanted)
        new = {row: list(row.tokens[len(row.held) :])[: self._chunk] for row in wanted}
        while new:
            began = perf_counter()
            drawn = self._step(new)
            if all(len(tokens) == 1 for tokens in new.values()):
                self._steps.note(len(new), perf_counter() - began)
            for row, token in zip(new, drawn, strict=True):
                row.held += new[row]
                if len(row.held) >= len(row.tokens):
                    row.drafted.append(token)
            new = {row: row.drafted[-1:] for row in new if 0 < len(row.drafted) < wanted[row]}

    def _place(self, row: DraftRow, others: Mapping[DraftRow, int]) -> None:
        """Give a row the slot that it had, or else the one unused for longest."""
        if row.slot is None or self._slots[row.slot] is not row:
            row.slot = next(slot for slot, owner in self._slots.items() if owner not in others)
            row.held = []
        del self._slots[row.slot]
        self._slots[row.slot] = row

    def _step(self, new: Mapping[DraftRow, Sequence[int]]) -> list[int]:
        """The likeliest token after the new ones of each row."""
        slots = np.array([row.slot for row in new], np.int64)
        past = np.array([len(row.held) for row in new], np.int64)
        counts = np.array([len(tokens) for tokens in new.values()], np.int64)
        ends = np.cumsum(counts)
        ids = np.array([token for tokens in new.values() for token in tokens], np.int64)
        places = np.arange(len(ids)) + np.repeat(past - (ends - counts), counts)
        given = ids[:, None], places, np.ones(len(ids), np.int64), ends[:, None] - 1
        values: dict[str, Value] = {
            **dict(zip(CACHED_INPUTS, given, strict=True)), ROW_LENGTHS: np.repeat(past + counts, counts)
        }  # fmt: skip
        rows = PackedRows(slots, past, counts)
        for hop in self._hops:
            found = self._lanes.ask(hop.stage, partial(_run, values, hop.fetch, rows)).result()
            values = {name: value for name, value in {**values, **found}.items() if name in hop.keep}
        logits = values["logits"]
        assert isinstance(logits, np.ndarray)
        return [int(token) for token in logits.reshape(len(slots), -1).argmax(axis=1)]


def open_speculation(
    options: PipelineOptions, size: CacheSize, model: TextModel, times: StepTimes, on_gpus: bool
) -> Speculation | None:
    """What drafts for the steps of a pipeline of `model` with caches of this size, as its options say; None: nothing.
    Errors as `DraftModel.open`."""
    if options.draft not in DRAFTS:
        if on_gpus:
            raise RequestError("a draft bundle is for pipelines with all stages on CPUs; leave it out")
        return DraftModel.open(Path(options.draft), options, size, model, times)
    return Speculation(times) if options.draft == "lookup" and not on_gpus else None


def _run(values: Mapping[str, Value], fetch: Sequence[str], rows: PackedRows, engine: Engine) -> Mapping[str, Value]:
    return engine.step(values, fetch, rows)


def _words(model: TextModel) -> tuple[int, list[str] | None]:
    """What the tokens of a model are."""
    return model.vocabulary, None if model.encoder is None else model.encoder.names(range(model.encoder.size))

"""One step of generation on its way through the stages, and what the last one makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from stageline.models.errors import EngineError
from stageline.runtime.engines import Array, Engine, PackedRows, Value
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.steps import Step
from stageline.runtime.stages.lanes import Lane
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.stages.trip import Trip

DRAWN = "drawn"  # in place of the logits, what the device has drawn from them


@dataclass(eq=False)
class Flight(Trip):
    """A step on its way through the stages, from the model's inputs to its logits.

    `values` are at first those of `inputs.step_inputs`. After a failure only its copies of cache rows are made, for
    other steps need them.
    """

    visits_all = True

    lane: Lane = field(init=False)  # where it is
    step: Step
    rows: int | PackedRows
    """Where its tokens lie, as `Engine.step` wants it."""
    requests: tuple[int, ...]
    """The number of each row's."""
    done: Callable[["Flight"], None]
    issued: Callable[["Flight"], None]
    """Called on the last stage's thread when the device has the step, drawing included, and has not done it yet."""
    settings: Array | None = None
    """float32 [slots, 6]: the last stage's device draws the tokens (see `Sampler`)."""
    logits: Array | None = None
    """float32 [slots, picks, vocabulary], or [picks, 1, vocabulary] of packed tokens, once the step has left the last
    stage, unless the device draws."""
    drawn: Array | None = None
    """int64 [slots, 2], the tokens and their status, if it does."""
    token: Value | None = None
    """int64 [slots, 1]: the same tokens on the device."""
    undrawn: Value | None = None
    """The logits on the device."""
    void: set[Continuation] = field(default_factory=set)
    """Those that got another token than the one that this step, which was issued ahead, computes for them."""

    def visit(self, lane: Lane, engine: Engine) -> None:
        self.lane = lane
        if self.step.copies:
            began = perf_counter()
            for copy in self.step.copies:
                engine.copy_slot(copy.source, copy.target, copy.tokens)
            lane.copied(began, self)

    def run(self, engine: Engine, fetch: Sequence[str]) -> Mapping[str, Value]:
        values = engine.step(self.values, fetch, self.rows)
        if self.settings is None or "logits" not in fetch:
            return values
        assert self.lane.sampler is not None
        self.undrawn = values["logits"]
        self.token, drawn = self.lane.sampler.draw(self.undrawn, self.settings)
        self.issued(self)
        return {DRAWN: drawn}

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        step, requests = self.step, tuple(dict.fromkeys(self.requests))
        if step.first_slot is not None:
            return step.kind, len(self.requests), step.length, requests
        if step.kind == "decode":
            return step.kind, step.batch, 1, requests  # drafted tokens are rows as well
        return step.kind, 1, step.batch, requests  # one row of all tokens

    def failure(self, lane: Lane, error: BaseException) -> EngineError:
        if isinstance(error, EngineError):
            return error
        return engine_error(f"stage {lane.number} failed in step {self.number}", error)

    def landed(self, lane: Lane, outcome: dict[str, Array] | EngineError) -> None:
        if not isinstance(outcome, EngineError):
            self.logits, self.drawn = outcome.get("logits"), outcome.get(DRAWN)
        self.done(self)


def engine_error(what: str, error: BaseException) -> EngineError:
    """The submitters' error for something unforeseen: its first line, and the thing itself as the cause."""
    line = str(error).strip().split("\n", 1)[0]
    failure = EngineError(f"{what}: {type(error).__name__}: {line}")
    failure.__cause__ = error
    return failure

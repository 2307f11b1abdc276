"""Taking from steps that have left the last stage what their logits say: next tokens, and how likely prompts are."""

from collections.abc import Callable, MutableMapping, Sequence

from stageline.models.errors import EngineError
from stageline.runtime.engines import Array
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.drawing import scores_of, tokens_of
from stageline.runtime.generation.flight import Flight
from stageline.runtime.generation.meter import Meter
from stageline.runtime.generation.running import RunningChoice
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.steps import chosen
from stageline.runtime.generation.writing import Scores, Taken


class Taking:
    """For the driver's thread, which owns all that this borrows."""

    def __init__(
        self,
        scheduler: Scheduler,
        meter: Meter,
        choices: MutableMapping[Continuation, RunningChoice],
        fail: Callable[[Continuation, EngineError], None],
    ) -> None:
        """`choices` are those that run; one that ends is taken out. `fail` ends one with an error, and those beside
        it."""
        self._scheduler, self._meter, self._choices, self._fail = scheduler, meter, choices, fail

    def all_of(self, flight: Flight, running: Sequence[Flight]) -> tuple[list[Taken], list[Scores]]:
        """What a step says, which is done. `running`: the steps that compute with its tokens already."""
        scores = self._scored(flight)
        wanted = [
            (place, self._choices[continuation])
            for place, continuation in chosen(flight.step)
            if not continuation.ended and continuation not in flight.void
        ]
        taken: list[Taken] = [self._without_tokens(choice) for _, choice in wanted if not choice.max_tokens]
        wanted = [(place, choice) for place, choice in wanted if choice.max_tokens]
        drafted = [choice.continuation for _, choice in wanted if choice.continuation.draft]
        self._meter.drafted_tokens += sum(len(continuation.draft) for continuation in drafted)
        depth = 0
        while wanted:  # one after the other, for each token changes what may follow it
            taken += (new := self._drawn(flight, wanted, running))
            if not drafted:
                break
            going_on = {choice for choice, token, *_ in new if choice.continuation.goes_as_drafted(depth, token)}
            wanted = [(place + 1, choice) for place, choice in wanted if choice in going_on]
            self._meter.accepted_tokens += len(wanted)
            depth += 1
        for continuation in drafted:
            self._scheduler.settle(continuation)
        self._meter.generated_tokens += sum(token is not None for _, token, *_ in taken)
        return taken, scores

    def _drawn(
        self, flight: Flight, wanted: Sequence[tuple[int, RunningChoice]], running: Sequence[Flight]
    ) -> list[Taken]:
        """Draw the next token of each choice, whose logits are at a place of the step."""
        places, choices = [place for place, _ in wanted], [choice for _, choice in wanted]
        logits: Array | None = None
        try:
            results, logits = tokens_of(flight, places, choices, running)
        except EngineError as error:
            results = [error] * len(choices)
        taken: list[Taken] = []
        for number, (choice, result) in enumerate(zip(choices, results, strict=True)):
            if choice.continuation.ended:
                continue  # a choice beside it has failed
            if isinstance(result, EngineError):
                self._fail(choice.continuation, result)
                continue
            text = choice.take(result)
            own = None if logits is None or choice.row.settings.logprobs is None else logits[number]
            taken.append((choice, result, choice.finish_reason, text, own))
            if running:
                self._scheduler.learn(choice.continuation)
            if choice.finish_reason is not None:
                self._take_out(choice)
            if running and choice.continuation in running[-1].void:
                self._scheduler.take_back(choice.continuation)
        return taken

    def _scored(self, flight: Flight) -> list[Scores]:
        """What the step says of prompts; a request of whose prompt it says nothing sound has failed."""
        scores: list[Scores] = []
        for continuation, first, logits in scores_of(flight):
            if continuation.ended:
                continue
            if isinstance(logits, EngineError):
                self._fail(continuation, logits)
            else:
                scores.append((self._choices[continuation].job, first, logits))
        return scores

    def _without_tokens(self, choice: RunningChoice) -> Taken:
        choice.take_nothing()
        self._take_out(choice)
        return choice, None, choice.finish_reason, None, None

    def _take_out(self, choice: RunningChoice) -> None:
        self._scheduler.end(choice.continuation)
        del self._choices[choice.continuation]

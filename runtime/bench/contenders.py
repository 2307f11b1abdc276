"""Who is measured: the contract that the load generator knows, the pipeline itself, and what answers call by call.

The other contenders stand apart: whole-model sessions in `sessions.py`, a served endpoint in `endpoint.py`, torch in
the exporter.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Protocol, TypeVar

from stageline.models.errors import EngineError
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline

_T = TypeVar("_T")


@dataclass(frozen=True)
class RequestOutcome:
    """How a request went, times of `time.perf_counter`. `gaps_s`: the times between the tokens of its first choice."""

    done_at: float
    tokens_out: int = 0
    first_token_at: float | None = None
    gaps_s: tuple[float, ...] = ()


class Contender(Protocol):
    """What answers requests. The runner opens it and closes it."""

    @property
    def name(self) -> str:
        """What the measurements call it."""
        ...

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline whose stages can be watched, if it is one."""
        ...

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """Send a request; does not wait for its end. A future that is cancelled may run on."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class PipelineContender:
    """A pipeline in this process, which it owns; `close` is called after the pipeline's own."""

    def __init__(self, name: str, pipeline: Pipeline, close: Callable[[], None] = lambda: None) -> None:
        self.name, self._close = name, close
        self.pipeline: Pipeline | None = pipeline
        named = [spec.name for spec in pipeline.signature.outputs]
        self.outputs = [EMBEDDING] if EMBEDDING in named else None
        """What a batch asks for; None: all of it."""
        self._pipeline = pipeline

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """See `Contender`. A continuation has exactly the tokens that were asked for: end tokens are not drawn."""
        told: Future[RequestOutcome] = Future()
        if item.output_tokens is None:
            _relay(self._pipeline.submit(item.inputs, self.outputs), told, lambda result, at: RequestOutcome(at))
        else:
            sampling = Sampling(max_tokens=item.output_tokens, min_tokens=item.output_tokens)
            _relay(self._pipeline.submit(GenerationRequest(item.rows[0], sampling)), told, _completed)
        return told

    def close(self) -> None:
        """Close the pipeline."""
        self._pipeline.close()
        self._close()


class CallContender:
    """A function that answers a list of requests at once, on a thread of its own: it gets what waits, at most `most`.

    So a peer that has no scheduler is at its best with static batches.
    """

    pipeline: Pipeline | None = None

    def __init__(
        self,
        name: str,
        call: Callable[[Sequence[Item]], Sequence[RequestOutcome]],
        most: int,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self._call, self._most, self._close = name, call, most, close
        self._inbox: SimpleQueue[tuple[Item, Future[RequestOutcome]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """See `Contender`."""
        told: Future[RequestOutcome] = Future()
        self._inbox.put((item, told))
        return told

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._inbox.put(None)
        self._thread.join()
        self._close()

    def _work(self) -> None:
        for first in iter(self._inbox.get, None):
            taken, last = [first], False
            while len(taken) < self._most:
                try:
                    another = self._inbox.get_nowait()
                except Empty:
                    break
                if another is None:
                    last = True
                    break
                taken.append(another)
            live = [(item, told) for item, told in taken if told.set_running_or_notify_cancel()]
            if live:
                try:
                    outcomes = self._call([item for item, _ in live])
                except BaseException as error:  # a peer may raise anything; whoever waits is told
                    line = str(error).strip().split("\n", 1)[0]
                    failure = EngineError(f"{self.name} failed: {type(error).__name__}: {line}")
                    failure.__cause__ = error
                    for _, told in live:
                        told.set_exception(failure)
                else:
                    for (_, told), outcome in zip(live, outcomes, strict=True):
                        told.set_result(outcome)
            if last:
                return


def _completed(completion: Completion, at: float) -> RequestOutcome:
    times = completion.token_times_s
    gaps = tuple(after - before for before, after in pairwise(times))
    return RequestOutcome(at, completion.completion_tokens, at - completion.total_s + completion.ttft_s, gaps)


def _relay(
    future: "Future[_T]", told: "Future[RequestOutcome]", outcome: Callable[[_T, float], RequestOutcome]
) -> None:
    """Settle `told` when `future` is done, and cancel `future` where `told` is cancelled."""

    def ended(future: "Future[_T]") -> None:
        at = perf_counter()
        if not told.set_running_or_notify_cancel():
            return
        error = None if future.cancelled() else future.exception()
        if error is not None:
            told.set_exception(error)
        elif not future.cancelled():
            told.set_result(outcome(future.result(), at))

    future.add_done_callback(ended)
    told.add_done_callback(lambda told: future.cancel() if told.cancelled() else None)

"""Who is measured: the contract that the load generator relies on, the pipeline itself, and plain functions.

Other contenders: whole-model sessions in `baselines.py`, a served endpoint in `endpoint.py`, torch in the exporter.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Protocol, TypeVar

from stageline.models.errors import EngineError, RequestError
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline

_T = TypeVar("_T")


@dataclass(frozen=True)
class RequestOutcome:
    """How a request went, in `perf_counter` times. `gaps_s`: times between the tokens of its first choice."""

    done_at: float
    tokens_out: int = 0
    first_token_at: float | None = None
    gaps_s: tuple[float, ...] = ()


class FailedRequestError(RequestError):
    """A request that failed in a known way: "status 429", "timeout", "disconnected", ..., as its `kind` says."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def shed(self) -> bool:
        """Whether the service answered that it has too much to do, which says nothing of the next request."""
        return self.kind in ("status 429", "status 503")


class Contender(Protocol):
    """Answers requests. The runner opens it and closes it."""

    @property
    def name(self) -> str:
        """Its name in measurements."""
        ...

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline whose stages can be observed, if any."""
        ...

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """Send a request without waiting for its end. A cancelled future may continue to run."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class PipelineContender:
    """A pipeline in this process, owned; `close` is called after the pipeline is closed."""

    def __init__(self, name: str, pipeline: Pipeline, close: Callable[[], None] = lambda: None) -> None:
        self.name, self._close = name, close
        self.pipeline: Pipeline | None = pipeline
        named = [spec.name for spec in pipeline.signature.outputs]
        self.outputs = [EMBEDDING] if EMBEDDING in named else None
        """The outputs that a batch request asks for; None: all."""
        self._pipeline = pipeline

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """See `Contender`. A continuation has exactly the requested number of tokens: end tokens are not drawn."""
        outcome: Future[RequestOutcome] = Future()
        if item.output_tokens is None:
            _relay(self._pipeline.submit(item.inputs, self.outputs), outcome, lambda result, at: RequestOutcome(at))
        else:
            sampling = Sampling(max_tokens=item.output_tokens, min_tokens=item.output_tokens)
            _relay(self._pipeline.submit(GenerationRequest(item.rows[0], sampling)), outcome, _completed)
        return outcome

    def close(self) -> None:
        """Close the pipeline."""
        self._pipeline.close()
        self._close()


class CallContender:
    """A function that answers a list of requests, on a thread of its own: it gets the waiting ones, up to `max_batch`.

    Static batches show a peer without a scheduler at its best.
    """

    pipeline: Pipeline | None = None

    def __init__(
        self,
        name: str,
        call: Callable[[Sequence[Item]], Sequence[RequestOutcome]],
        max_batch: int,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self._call, self._max_batch, self._close = name, call, max_batch, close
        self._inbox: SimpleQueue[tuple[Item, Future[RequestOutcome]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        """See `Contender`."""
        outcome: Future[RequestOutcome] = Future()
        self._inbox.put((item, outcome))
        return outcome

    def close(self) -> None:
        """Answer the waiting requests, then end the thread."""
        self._inbox.put(None)
        self._thread.join()
        self._close()

    def _work(self) -> None:
        for first in iter(self._inbox.get, None):
            taken, last = [first], False
            while len(taken) < self._max_batch:
                try:
                    another = self._inbox.get_nowait()
                except Empty:
                    break
                if another is None:
                    last = True
                    break
                taken.append(another)
            live = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
            if live:
                try:
                    outcomes = self._call([item for item, _ in live])
                except BaseException as error:  # a peer may raise anything; it goes to the waiting requests
                    line = str(error).strip().split("\n", 1)[0]
                    failure = EngineError(f"{self.name} failed: {type(error).__name__}: {line}")
                    failure.__cause__ = error
                    for _, future in live:
                        future.set_exception(failure)
                else:
                    for (_, future), outcome in zip(live, outcomes, strict=True):
                        future.set_result(outcome)
            if last:
                return


def _completed(completion: Completion, at: float) -> RequestOutcome:
    times = completion.token_times_s
    gaps = tuple(after - before for before, after in pairwise(times))
    return RequestOutcome(at, completion.completion_tokens, at - completion.total_s + completion.ttft_s, gaps)


def _relay(
    future: "Future[_T]", outcome: "Future[RequestOutcome]", outcome_of: Callable[[_T, float], RequestOutcome]
) -> None:
    """Settle `outcome` when `future` is done, and cancel `future` if `outcome` is cancelled."""

    def ended(future: "Future[_T]") -> None:
        at = perf_counter()
        if not outcome.set_running_or_notify_cancel():
            return
        error = None if future.cancelled() else future.exception()
        if error is not None:
            outcome.set_exception(error)
        elif not future.cancelled():
            outcome.set_result(outcome_of(future.result(), at))

    future.add_done_callback(ended)
    outcome.add_done_callback(lambda outcome: future.cancel() if outcome.cancelled() else None)

"""The driver of generation: one thread that schedules steps, sends them through the stages, and draws the tokens.

Everything that changes a request or the scheduler runs on that thread, one event after the other, so nothing here needs
a lock: other threads only put events into its inbox. A stage's worker runs a step's part and puts it into the next
stage's inbox; the last stage's worker puts the logits into the driver's.

    submit ──> arrived ──> [scheduler] ──step──> stage 0 ──> ... ──> stage N-1 ──> drawn ──> pieces to the reader
                               ^                                                     │
                               └─────────────────────────────────────────────────────┘
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter

import numpy as np
from stageline.models.errors import DeadlineError, EngineError, RequestError, StagelineError
from stageline.runtime.bundle.manifest import CACHED_INPUTS
from stageline.runtime.engines import Array, Engine, Value
from stageline.runtime.generation.changeover import Changeover, move_caches
from stageline.runtime.generation.meter import GenerationStats, Meter
from stageline.runtime.generation.request import Completion, Delta, GenerationRequest
from stageline.runtime.generation.running import Job, RunningChoice
from stageline.runtime.generation.sampling import Drawn, sample
from stageline.runtime.generation.scheduler import Continuation, Scheduler, Step, chosen_rows
from stageline.runtime.generation.stream import Generation
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.stages.lanes import Lane, Lanes, StageStats
from stageline.runtime.stages.recorder import Kind
from stageline.runtime.stages.route import Hop


@dataclass(eq=False, slots=True)
class _Flight:
    """A step on its way through the stages; the worker of the stage that it is at owns it."""

    step: Step
    values: dict[str, Value]
    requests: tuple[int, ...]
    """The number of each row's."""
    hop: int = 0
    logits: Array | None = None
    """float32 [slots, picks, vocabulary], once the step has left the last stage."""
    error: EngineError | None = None

    @property
    def number(self) -> int:
        return self.step.number

    def traced(self) -> tuple[Kind, int, int, tuple[int, ...]]:
        return self.step.kind, len(self.step.rows), self.step.length, tuple(dict.fromkeys(self.requests))


class Generator:
    """Generates on open lanes. Thread-safe; owns its driver thread until `close()`, which closes the lanes as well: the
    driver alone knows when no step is on its way through them. `go_on` exchanges the lanes: the driver then lets go of
    the ones it had, and whoever asked closes them."""

    def __init__(self, lanes: Lanes, hops: Sequence[Hop], decoder: TextModel, slots: int, capacity: int, chunk: int):
        """`hops`: the way of a step through all the stages, to `logits`. The stages' engines have caches of `slots` x
        `capacity`; a prompt goes through in chunks of `chunk` tokens."""
        self.decoder, self.capacity = decoder, capacity
        self._lanes, self._hops = lanes, tuple(hops)
        groups = min(len(lanes), slots)
        self._scheduler = Scheduler(slots, capacity, groups, min(chunk, capacity), prefills=len(lanes))
        self._choices: dict[Continuation, RunningChoice] = {}
        self._jobs: dict[Generation, Job] = {}
        self._meter = Meter(slots)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._in_flight = self._arrivals = 0
        self._change: Changeover | None = None
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # between `submit` and `close`: no request comes after the last event
        self._thread = threading.Thread(target=self._drive, name="generator", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, prompt: list[int], release: Callable[[], None]) -> Generation:
        """Start on a request whose prompt is `prompt`; `release` is called once when it has ended."""
        generation = Generation()
        job = Job(request, prompt, generation, release, perf_counter())
        with self._lock:
            if self._closed:
                release()
                raise RequestError("the pipeline is closed")
            self._events.put(partial(self._arrived, job))
        return generation

    def go_on(self, lanes: Lanes, hops: Sequence[Hop], keep_caches: bool) -> "Future[float]":
        """Change over to other lanes between two steps, as `Changeover` says; one change at a time.

        The future gives the pause in seconds; while it fails or is cancelled, the lanes are those of before. Its error
        is a RequestError where the pipeline was closed meanwhile, else what an engine raised.
        """
        change = Changeover(lanes, hops, keep_caches)
        with self._lock:
            if self._closed:
                raise RequestError("the pipeline is closed")
            self._events.put(partial(self._change_asked, change))
        return change.pause_s

    def is_driver(self) -> bool:
        """Whether the caller is the driver's thread, as a future's callback may be."""
        return threading.current_thread() is self._thread

    def stats(self, stages: Sequence[StageStats]) -> GenerationStats:
        """A snapshot of the counters since the pipeline opened; `stages` are those of its stages."""
        return self._meter.stats(stages)

    def close(self, wait: bool = True) -> None:
        """Fail what is unfinished with RequestError, and close the lanes when the steps under way are done.

        May be called again. Returns when all threads have ended, but without `wait`, or to a callback on one of them,
        at once.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._events.put(self._close)
        if wait and not self.is_driver() and not self._lanes.is_worker():
            self._thread.join()

    # The driver's thread.

    def _drive(self) -> None:
        try:
            self._take_events()
        except BaseException as error:  # a bug, of ours or of an engine: nobody shall wait for ever
            self._give_up(_engine_error("the generator failed", error))
        self._drop_change(RequestError("the pipeline was closed before its stages were exchanged"))
        self._lanes.close()

    def _take_events(self) -> None:
        while not (self._closing and self._in_flight == 0):
            try:
                event = self._events.get(timeout=self._until_deadline())
            except Empty:
                self._check_deadlines()
                continue
            began = perf_counter()
            while True:
                event()
                try:
                    event = self._events.get_nowait()
                except Empty:
                    break
            self._check_deadlines()
            if self._change is not None and self._ready_for(self._change):
                self._make(self._change)
            if not self._closing and (self._change is None or not self._change.keep_caches):
                while (step := self._scheduler.next()) is not None:
                    self._send(step)
            held = len(self._change.held) if self._change is not None else 0
            self._meter.waiting, self._meter.running = len(self._scheduler.waiting) + held, self._scheduler.running
            self._meter.host_s += perf_counter() - began

    def _arrived(self, job: Job) -> None:
        self._jobs[job.generation] = job
        job.number, self._arrivals = self._arrivals, self._arrivals + 1
        job.begin(self.decoder, self.capacity)
        for choice in job.choices:
            continuation = choice.continuation
            self._choices[continuation] = choice
            if self._change is None or self._change.keep_caches:
                self._scheduler.add(continuation)
            else:
                self._change.held.append(continuation)
        # Last, since it may be called at once.
        job.generation.future.add_done_callback(lambda future: self._events.put(partial(self._dropped, job)))

    def _dropped(self, job: Job) -> None:
        """The request's future is done: if that was not our doing, it was cancelled."""
        if job.generation in self._jobs:
            self._meter.cancelled += 1
            self._forget(job)

    def _change_asked(self, change: Changeover) -> None:
        if self._change is not None:  # its asker has given up
            change.held += self._change.held
        self._change = change
        if not change.keep_caches:
            begun = {c.job.generation for c in self._choices.values() if c.continuation.placed_at}
            for continuation in list(self._scheduler.waiting):
                if self._choices[continuation].job.generation not in begun:
                    self._scheduler.waiting.remove(continuation)
                    change.held.append(continuation)

    def _ready_for(self, change: Changeover) -> bool:
        idle = not self._scheduler.running and not self._scheduler.waiting
        return self._in_flight == 0 and (change.keep_caches or idle)

    def _make(self, change: Changeover) -> None:
        """Exchange the lanes; no step is under way."""
        self._change = None
        if change.pause_s.set_running_or_notify_cancel():
            try:
                if change.keep_caches:
                    move_caches(self._lanes, change.lanes)
            except BaseException as error:
                change.pause_s.set_exception(error)
            else:
                self._meter.switched(self._lanes.stats(self._lanes.open_s))
                self._lanes, self._hops = change.lanes, tuple(change.hops)
                groups = min(len(self._lanes), len(self._scheduler.rows))
                self._scheduler.regroup(groups, prefills=len(self._lanes), forget=not change.keep_caches)
                change.pause_s.set_result(perf_counter() - change.asked_at)
        for continuation in change.held:
            if not continuation.ended:
                self._scheduler.add(continuation)

    def _drop_change(self, error: StagelineError) -> None:
        change, self._change = self._change, None
        if change is not None and change.pause_s.set_running_or_notify_cancel():
            change.pause_s.set_exception(error)

    def _until_deadline(self) -> float | None:
        ends = [job.submitted_at + d for job in self._jobs.values() if (d := job.request.deadline_s) is not None]
        return max(0.0, min(ends) - perf_counter()) if ends else None

    def _check_deadlines(self) -> None:
        now = perf_counter()
        for job in list(self._jobs.values()):
            deadline_s = job.request.deadline_s
            if deadline_s is not None and now >= job.submitted_at + deadline_s:
                drawn = sum(len(choice.drawn) for choice in job.choices)
                self._end(job, DeadlineError(f"not finished within {deadline_s} s ({drawn} tokens were drawn)"))

    def _send(self, step: Step) -> None:
        now = perf_counter()
        ids = np.zeros((step.slots, step.length), np.int64)
        past, new = np.zeros(step.slots, np.int64), np.zeros(step.slots, np.int64)
        picks = np.zeros((step.slots, int(any(row.last for row in step.rows))), np.int64)
        requests = []
        for row in step.rows:
            place = row.slot - step.first_slot
            ids[place, : row.count] = row.continuation.tokens[row.start : row.start + row.count]
            past[place], new[place] = row.start, row.count
            if row.last:
                picks[place] = row.count - 1
            job = self._choices[row.continuation].job
            requests.append(job.number)
            if job.started_at is None:
                job.started_at = now
                self._meter.queue_s.append(now - job.submitted_at)
        values: dict[str, Value] = dict(zip(CACHED_INPUTS, (ids, past, new, picks), strict=True))
        self._in_flight += 1
        self._meter.sent(now)
        self._lanes.put(0, partial(self._through, _Flight(step, values, tuple(requests))))

    def _drawn(self, flight: _Flight) -> None:
        """A step has left the last stage."""
        self._in_flight -= 1
        step, now = flight.step, perf_counter()
        self._meter.done(step, self._in_flight, now)
        if flight.error is not None:
            for continuation in self._scheduler.failed(step):
                self._fail(continuation, flight.error)
            return
        self._scheduler.done(step)
        wanted = [(place, row.continuation) for place, row in chosen_rows(step) if not row.continuation.ended]
        if not wanted:
            return
        assert flight.logits is not None
        logits = flight.logits[:, 0]
        if len(wanted) < len(logits):
            logits = logits[[place for place, _ in wanted]]
        choices = [self._choices[continuation] for _, continuation in wanted]
        pieces: dict[Generation, list[Delta]] = {}
        for choice, result in zip(choices, sample(logits, [choice.row for choice in choices]), strict=True):
            if choice.continuation.ended:
                continue  # a choice beside it has failed
            if isinstance(result, EngineError):
                self._fail(choice.continuation, result)
            else:
                pieces.setdefault(choice.job.generation, []).append(self._add(choice, result, now))
        for generation, new in pieces.items():
            generation.push(new)
        for job in {choice.job for choice in choices}:
            if job.generation in self._jobs and all(choice.finish_reason for choice in job.choices):
                self._end(job, job.completion(now))

    def _add(self, choice: RunningChoice, drawn: Drawn, now: float) -> Delta:
        job = choice.job
        piece = choice.add(drawn, self.decoder.end_ids)
        if choice.number == 0:
            self._meter.token(job.token_times[-1] if job.token_times else None, now, job.submitted_at)
            job.token_times.append(now)
        job.first_token_at = job.first_token_at or now
        self._meter.generated_tokens += 1
        if choice.finish_reason is not None:
            self._scheduler.end(choice.continuation)
            del self._choices[choice.continuation]
        return piece

    def _fail(self, continuation: Continuation, error: StagelineError) -> None:
        choice = self._choices.get(continuation)
        if choice is not None:
            self._scheduler.end(continuation, keep=0)
            self._end(choice.job, error)

    def _end(self, job: Job, end: Completion | StagelineError) -> None:
        """Settle the request, and let go of it."""
        self._forget(job)
        future = job.generation.future
        if not future.set_running_or_notify_cancel():
            self._meter.cancelled += 1
        elif isinstance(end, StagelineError):
            self._meter.failed += 1
            future.set_exception(end)
        else:
            self._meter.completed(end)
            future.set_result(end)

    def _forget(self, job: Job) -> None:
        for choice in job.choices:
            if self._choices.pop(choice.continuation, None) is not None:
                self._scheduler.end(choice.continuation)
        if self._jobs.pop(job.generation, None) is not None and self._lanes.recorder is not None:
            self._lanes.recorder.ended(job.number, job.submitted_at, perf_counter())
        job.release()

    def _give_up(self, error: EngineError) -> None:
        """Fail what is unfinished and what comes, until closed."""
        while True:
            self._drop_change(error)
            for job in list(self._jobs.values()):
                self._end(job, error)
            if self._closing and self._in_flight == 0:
                break
            with contextlib.suppress(Exception):
                self._events.get()()

    def _close(self) -> None:
        self._closing = True
        for job in list(self._jobs.values()):
            self._end(job, RequestError("the pipeline was closed before this request was finished"))

    # The stages' threads.

    def _through(self, flight: _Flight, lane: Lane, engine: Engine) -> None:
        """A step's part in one stage. After a failure only its copies of cache rows are made, for others need them."""
        hop = self._hops[flight.hop]
        try:
            if flight.step.copies:
                began = perf_counter()
                for copy in flight.step.copies:
                    engine.copy_slot(copy.source, copy.target, copy.tokens)
                lane.copied(began, flight)
            if flight.error is None:
                began = perf_counter()
                outputs = engine.step(flight.values, hop.fetch, flight.step.first_slot)
                lane.ran(began, flight)
                flight.values = {n: v for n, v in {**flight.values, **outputs}.items() if n in hop.keep}
        except BaseException as error:  # whatever an engine raises, the worker lives on
            flight.error = _step_error(lane, flight, error)
        flight.hop += 1
        if flight.hop < len(self._hops):
            self._lanes.put(self._hops[flight.hop].stage, partial(self._through, flight))
            return
        landed = partial(self._landed, flight, lane)
        try:
            lane.land({} if flight.error else flight.values, landed)
        except BaseException as error:
            landed(error)

    def _landed(self, flight: _Flight, lane: Lane, outputs: dict[str, Array] | BaseException) -> None:
        """A step's logits are in host memory, or never will be."""
        if isinstance(outputs, BaseException):
            flight.error = _step_error(lane, flight, outputs)
        else:
            flight.logits = outputs.get("logits")
        flight.values = {}
        self._events.put(partial(self._drawn, flight))


def _step_error(lane: Lane, flight: _Flight, error: BaseException) -> EngineError:
    if isinstance(error, EngineError):
        return error
    return _engine_error(f"stage {lane.number} failed in step {flight.step.number}", error)


def _engine_error(what: str, error: BaseException) -> EngineError:
    """What the submitters are told of something unforeseen: its first line, and the thing itself as the cause."""
    line = str(error).strip().split("\n", 1)[0]
    told = EngineError(f"{what}: {type(error).__name__}: {line}")
    told.__cause__ = error
    return told

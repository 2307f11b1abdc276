"""The driver of generation: one thread that schedules steps, sends them through the stages, and draws the tokens.

Everything that changes a request or the scheduler runs on that thread, one event after the other, so nothing here needs
a lock: other threads only put events into its inbox. A stage's worker runs a step's part and puts it into the next
stage's inbox; the last stage's worker puts the logits into the driver's.

    submit ──> arrived ──> [scheduler] ──step──> stage 0 ──> ... ──> stage N-1 ──> drawn
                               ^                                                     │
                               └─────────────────────────────────────────────────────┴──> written: pieces to the reader

A step's tokens are written while the next step computes. Since Python's threads take turns, the driver first waits a
moment, in which the stage's worker hands the step to its engine, unless something else happens.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter

from stageline.models.errors import DeadlineError, EngineError, RequestError, StagelineError, StageLostError
from stageline.runtime.admission import Admission
from stageline.runtime.bundle.manifest import INPUT_IDS
from stageline.runtime.engines import Array, CacheSize, Value
from stageline.runtime.generation.blocks import Blocks
from stageline.runtime.generation.changeover import Changeover
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.drawing import settings_of
from stageline.runtime.generation.flight import DRAWN, Flight, engine_error
from stageline.runtime.generation.inputs import step_inputs
from stageline.runtime.generation.meter import GenerationStats, Meter
from stageline.runtime.generation.request import Completion, GenerationRequest
from stageline.runtime.generation.running import Job, RunningChoice
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.generation.speculation import Speculation
from stageline.runtime.generation.step_times import StepTimes
from stageline.runtime.generation.steps import Step, chosen
from stageline.runtime.generation.stream import Generation
from stageline.runtime.generation.taking import Taking
from stageline.runtime.generation.text_model import TextModel
from stageline.runtime.generation.writing import Writer
from stageline.runtime.stages.lanes import Lanes, StageStats
from stageline.runtime.stages.route import Hop

_HAND_OVER_S = 1e-4  # enough for a worker to wake


class Generator:
    """Generates on open lanes, which it borrows. Thread-safe; owns its driver thread until `close()`, whose future is
    done when no step runs on the lanes any more. `switch` exchanges the lanes for others between two steps."""

    def __init__(
        self,
        lanes: Lanes,
        hops: Sequence[Hop],
        text_model: TextModel,
        cache: CacheSize,
        chunk: int,
        queue: int,
        times: StepTimes | None = None,
        speculation: Speculation | None = None,
        tpot_target: float | None = None,
    ) -> None:
        """`hops`: the route of a step through all the stages, to `logits`. The stages' engines have caches of size
        `cache`; a prompt goes through in chunks of `chunk` tokens. `queue` bounds the unfinished requests. `times`,
        `speculation`, which is closed with this, and `tpot_target` (seconds) are as in `Scheduler`; the last two are
        for stages on CPUs, whose steps' times are known. RequestError for such a target elsewhere."""
        if tpot_target is not None and lanes.on_gpus:
            raise RequestError("tpot_target is for pipelines with all stages on CPUs; leave it out")
        self.text_model, self.capacity = text_model, cache.capacity
        self._lanes, self._hops = lanes, tuple(hops)
        self._decoding: dict[int, list[Flight]] = {}  # of each group, in the order in which they were issued
        groups = min(lanes.places, cache.slots)
        chunk = min(chunk, cache.capacity)
        self._scheduler = Scheduler(
            cache.slots,
            cache.capacity,
            groups,
            chunk,
            prefills=lanes.places,
            packs=lanes.packs,
            blocks=Blocks(cache.blocks(size), size) if (size := lanes.block_tokens) is not None else None,
            scaling=text_model.row_scaling,
            speculation=speculation,
            shelves=cache.rows - cache.slots,
            tpot_target=tpot_target,
            times=times or StepTimes(),
        )
        self._changeover = Changeover(self._scheduler, lanes, hops, keep_caches=True, state="done")
        self.waits_for_lost = False
        """Whether continuations wait for other lanes where a stage of theirs is lost, and do not fail."""
        self._lost = False  # a stage, until others serve
        self._choices: dict[Continuation, RunningChoice] = {}
        self._jobs: dict[Generation, Job] = {}
        self._deadlines: dict[Job, float] = {}  # of those that have one, by `perf_counter`
        self._meter = Meter(cache.slots)
        self._writer = Writer(self._meter, self._finished)
        self._taking = Taking(self._scheduler, self._meter, self._choices, self._fail)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._in_flight = self._arrivals = 0
        self._admission = Admission(queue)
        self._closing = False
        self._closed = False
        self.broken: str | None = None
        """Why it generates nothing any more, if its driver has died of a bug."""
        self._stopped: Future[None] = Future()
        self._lock = threading.Lock()  # between `submit` and `close`: no request comes after the last event
        self._thread = threading.Thread(target=self._drive, name="generator", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, wait: bool, timeout: float | None) -> Generation:
        """See `Pipeline.start`."""
        job = self._job(request)
        self._admission.take(wait, timeout)
        return self._start(job)

    def prepare(self, request: GenerationRequest) -> None:
        """See `Pipeline.prepare`."""
        self.text_model.matcher(request.sampling.structure)

    async def submit_async(self, request: GenerationRequest) -> Generation:
        """See `Pipeline.astart`."""
        if request.sampling.structure is not None:
            await asyncio.to_thread(self.prepare, request)
        job = self._job(request)
        await self._admission.take_async()
        return self._start(job)

    def _job(self, request: GenerationRequest) -> Job:
        prompt = self.text_model.prompt_ids(request.prompt, self.capacity)
        settings = self.text_model.settings(request.sampling, len(prompt))
        matcher = self.text_model.matcher(settings.structure)
        return Job(request, settings, prompt, Generation(), perf_counter(), matcher)

    def _start(self, job: Job) -> Generation:
        with self._lock:
            if self._closed:
                self._admission.give_back()
                raise RequestError("the pipeline is closed")
            self._events.put(partial(self._arrived, job))
        return job.generation

    def give_up(self, error: StagelineError) -> None:
        """There will be no others for the stages that are lost: fail what waits for them, and what comes."""

        def fail() -> None:
            self.waits_for_lost = self._lost = False
            for job in list(self._jobs.values()):
                self._end(job, error)

        self._events.put(fail)

    def switch(self, lanes: Lanes, hops: Sequence[Hop], keep_caches: bool, replay: bool = False) -> "Future[float]":
        """Switch to other lanes between two steps, as `Changeover` describes; one changeover at a time.

        The future has the pause in seconds; if it fails or is cancelled, the old lanes stay. Its error is a
        RequestError where the pipeline was closed meanwhile, else what an engine raised.
        """
        changeover = Changeover(self._scheduler, lanes, hops, keep_caches, replay=replay)
        with self._lock:
            if self._closed:
                raise RequestError("the pipeline is closed")
            self._events.put(partial(self._changeover_asked, changeover))
        return changeover.pause_s

    def is_driver(self) -> bool:
        """Whether the caller is the driver's thread, as a future's callback may be."""
        return threading.current_thread() is self._thread

    def stats(self, stages: Sequence[StageStats]) -> GenerationStats:
        """A snapshot of the counters since the pipeline opened; `stages` are those of its stages."""
        scheduler = self._scheduler
        waiting = len(scheduler.waiting) + len(self._changeover.held)
        return self._meter.stats(stages, scheduler.running, waiting, scheduler.cache_usage, scheduler.set_back)

    def close(self) -> "Future[None]":
        """Fail what is unfinished with RequestError. The future is done when no step runs, and none will. May be called
        again."""
        self._admission.close("the pipeline is closed")
        with self._lock:
            if not self._closed:
                self._closed = True
                self._events.put(self._close)
        return self._stopped

    def join(self) -> None:
        """Wait for the end of the driver's thread, and of the callbacks of `close`."""
        self._thread.join()

    # The driver's thread.

    def _drive(self) -> None:
        try:
            self._take_events()
        except BaseException as error:  # a bug, of ours or of an engine: nobody shall wait for ever
            failure = engine_error("the generator failed", error)
            self.broken = str(failure)
            self._give_up(failure)
        if self._scheduler.speculation is not None:
            self._scheduler.speculation.close()
        self._changeover.drop(RequestError("the pipeline was closed before its stages were switched"))
        self._stopped.set_result(None)

    def _take_events(self) -> None:
        while not (self._closing and self._in_flight == 0):
            event = self._next_event()
            began = perf_counter()
            while event is not None:
                event()
                event = self._event(0)
            self._check_deadlines()
            if not self._closing and self._changeover.drained(self._in_flight):
                self._changeover.switch(self._lanes, self._serve_on)
            if not self._closing and not self._lost and self._changeover.issues_steps:
                while (step := self._scheduler.next()) is not None:
                    self._send(step)
            self._meter.host_s += perf_counter() - began

    def _next_event(self) -> Callable[[], None] | None:
        """Wait for the next one, and write before what waits to be written. None at a deadline."""
        if self._writer:
            event = self._event(_HAND_OVER_S if self._in_flight else 0)
            if event is not None:
                return event
            began = perf_counter()
            self._writer.write()
            self._meter.host_s += perf_counter() - began
        return self._event(self._until_deadline())

    def _event(self, timeout_s: float | None) -> Callable[[], None] | None:
        try:
            return self._events.get(timeout=timeout_s) if timeout_s != 0 else self._events.get_nowait()
        except Empty:
            return None

    def _arrived(self, job: Job) -> None:
        self._jobs[job.generation] = job
        if job.request.deadline_s is not None:
            self._deadlines[job] = job.submitted_at + job.request.deadline_s
        job.number, self._arrivals = self._arrivals, self._arrivals + 1
        speculation = self._scheduler.speculation
        job.begin(self.text_model, self.capacity, None if speculation is None else speculation.begin)
        for choice in job.choices:
            self._choices[choice.continuation] = choice
            self._changeover.admit(choice.continuation)
        # Last, since it may be called at once.
        job.generation.future.add_done_callback(lambda future: self._events.put(partial(self._dropped, job)))

    def _dropped(self, job: Job) -> None:
        """The request's future is done: if that was not our doing, it was cancelled."""
        if job.generation in self._jobs:
            self._meter.cancelled += 1
            self._forget(job)

    def _changeover_asked(self, changeover: Changeover) -> None:
        begun = {choice.job for choice in self._choices.values() if choice.continuation.placed_at}
        changeover.begin(self._changeover, lambda continuation: self._choices[continuation].job in begun)
        self._changeover = changeover

    def _serve_on(self, lanes: Lanes, hops: tuple[Hop, ...]) -> None:
        self._meter.switched(self._lanes.stats(self._lanes.open_s))
        self._lanes, self._hops, self._lost = lanes, hops, False

    def _until_deadline(self) -> float | None:
        return max(0.0, min(self._deadlines.values()) - perf_counter()) if self._deadlines else None

    def _check_deadlines(self) -> None:
        if not self._deadlines:
            return
        now = perf_counter()
        due = [job for job, at in self._deadlines.items() if now >= at]
        if due:
            self._writer.write()  # which may end some of them
        for job in due:
            if job in self._deadlines:
                drawn = sum(choice.drawn for choice in job.choices)
                error = f"not finished within {job.request.deadline_s} s ({drawn} tokens were drawn)"
                self._end(job, DeadlineError(error))

    def _send(self, step: Step, before: Flight | None = None) -> None:
        """`before`: the running step that draws the tokens which this one computes."""
        now = perf_counter()
        inputs, rows = step_inputs(step)
        values: dict[str, Value] = {**inputs}
        requests = []
        for continuation in step.arrays.continuations:
            job = self._choices[continuation].job
            requests.append(job.number)
            if job.started_at is None:
                job.started_at = now
                self._meter.started(now - job.submitted_at)
        if before is not None:
            assert before.token is not None
            values[INPUT_IDS] = before.token
        hops, settings = self._hops, self._device_settings(step, ahead=before is not None)
        if settings is not None:
            hops = (*hops[:-1], replace(hops[-1], keep=frozenset({DRAWN})))
        flight = Flight(
            self._lanes, hops, values, step.number, step, rows, tuple(requests), self._landed, self._issued, settings
        )
        if step.kind == "decode":
            self._decoding.setdefault(step.group, []).append(flight)
        self._in_flight += 1
        self._meter.sent(now)
        flight.start()

    def _device_settings(self, step: Step, ahead: bool) -> Array | None:
        """The settings with which the last stage's device draws all tokens of a step; None if the host must draw."""
        if (
            step.arrays.scored is not None
            or step.arrays.drafted is not None
            or not self._lanes.draws(self._hops[-1].stage)
        ):
            return None
        rows = [(place, self._choices[continuation].row) for place, continuation in chosen(step)]
        return settings_of(rows, step.batch, ahead)

    def _issued(self, flight: Flight) -> None:
        """On the last stage's thread."""
        self._events.put(partial(self._go_ahead, flight))

    def _go_ahead(self, flight: Flight) -> None:
        """Issue the step after a running one, whose tokens the device draws and hands on by itself."""
        if flight.token is None or self._closing or self._lost or not self._changeover.issues_steps:
            return
        if self._decoding.get(flight.step.group, [])[-1:] != [flight]:
            return
        step = self._scheduler.ahead(flight.step, self._needs_another)
        if step is not None:
            self._send(step, flight)

    def _needs_another(self, continuation: Continuation) -> bool:
        """Whether a continuation goes on after the token that is being drawn, as far as that can be known."""
        choice = self._choices[continuation]
        return choice.drawn + 1 < choice.max_tokens and choice.row.device_settings(1) is not None

    def _landed(self, flight: Flight) -> None:
        """On the last stage's thread."""
        self._events.put(partial(self._drawn, flight))

    def _drawn(self, flight: Flight) -> None:
        """A step has left the last stage."""
        self._in_flight -= 1
        step, now = flight.step, perf_counter()
        running = self._decoding.get(step.group, [])
        if flight in running:
            running.remove(flight)
        self._meter.done(step, self._in_flight, now)
        if self.waits_for_lost and isinstance(flight.error, StageLostError):
            self._lost = True
            self._scheduler.lost(step)
            return
        if flight.error is not None:
            for continuation in self._scheduler.failed(step):
                self._fail(continuation, flight.error)
            return
        if self._writer.holds(step.group):
            self._writer.write()
        self._scheduler.done(step)
        if not self._lanes.on_gpus:
            self._scheduler.times.note(step, flight.busy_s)
        taken, scores = self._taking.all_of(flight, running)
        self._writer.put(step.group, now, taken, scores)
        if running:
            self._go_ahead(running[-1])

    def _finished(self, job: Job, now: float) -> None:
        """All of it is written."""
        if job.generation in self._jobs:
            self._end(job, job.completion(now))

    def _fail(self, continuation: Continuation, error: StagelineError) -> None:
        choice = self._choices.get(continuation)
        if choice is not None:
            self._writer.write()
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
        self._deadlines.pop(job, None)
        if self._jobs.pop(job.generation, None) is not None and self._lanes.recorder is not None:
            self._lanes.recorder.ended(job.number, job.submitted_at, perf_counter())
        self._admission.give_back()

    def _give_up(self, error: EngineError) -> None:
        """Fail what is unfinished and what comes, until closed."""
        while True:
            self._changeover.drop(error)
            for job in list(self._jobs.values()):
                self._end(job, error)
            if self._closing and self._in_flight == 0:
                break
            with contextlib.suppress(Exception):
                self._events.get()()

    def _close(self) -> None:
        self._closing = True
        self._writer.write()
        for job in list(self._jobs.values()):
            self._end(job, RequestError("the pipeline was closed before this request was finished"))

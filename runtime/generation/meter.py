"""Counters and distributions of generation: TTFT, TPOT, queue, slots, steps, host time, bubble ratio."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from stageline.runtime.generation.request import Completion
from stageline.runtime.generation.steps import Step
from stageline.runtime.stages.lanes import StageStats
from stageline.runtime.times import BOUNDS_TOKENS, Histogram, Tally

_KEPT = 10_000  # the latest times, of which percentiles are taken


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of times, in seconds; all zero if there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """Interpolated between the two nearest."""
        if not values:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p50, p90, p99 = np.percentile(np.array(values), [50, 90, 99]).tolist()
        return cls(len(values), float(np.mean(values)), p50, p90, p99)


@dataclass(frozen=True)
class GenerationTimes:
    """All times since the pipeline opened: of whole requests (`latency`), in the queue, to the first token, and per
    token after it. Of requests that are done: from the first step to the first token (`prefill`), from there to the
    last one (`decode`), both together (`inference`), and `decode` per token of the first choice (`mean_tpot`)."""

    latency: Histogram
    queue: Histogram
    ttft: Histogram
    tpot: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    mean_tpot: Histogram


@dataclass(frozen=True)
class GenerationStats:
    """What generation did since the pipeline opened.

    `cache_usage` is the share of the KV cache that running sequences fill, 0 to 1. `set_back` is how often a sequence
    gave its part of it to an older one, to be computed again. Of `drafted_tokens` that steps computed as drafts,
    `accepted_tokens` were right. `host_s` is the time of the driver's thread (scheduling,
    sampling, detokenising). `bubble_ratio` is the share of stage time that was idle while steps were running:
    1 - busy time / (stages x `active_s`). `finished` counts choices by why they ended; `prompt_length` and `length` are
    the tokens of prompts and of choices that are done.
    """

    slots: int
    running: int
    waiting: int
    cache_usage: float
    done: int
    failed: int
    cancelled: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    prefill_steps: int
    decode_steps: int
    mixed_steps: int
    set_back: int
    active_s: float
    host_s: float
    bubble_ratio: float
    queue_s: Percentiles
    ttft_s: Percentiles
    tpot_s: Percentiles
    times: GenerationTimes
    finished: Mapping[str, int]
    prompt_length: Histogram
    length: Histogram


class Meter:
    """Written by the driver's thread alone; read by any, a number at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.finished = self.failed = self.cancelled = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.steps = {"prefill": 0, "decode": 0, "mixed": 0}
        self.active_s = self.host_s = 0.0
        self.queue_s: deque[float] = deque(maxlen=_KEPT)
        self.ttft_s: deque[float] = deque(maxlen=_KEPT)
        self.tpot_s: deque[float] = deque(maxlen=_KEPT)
        self._times = tuple(Tally() for _ in fields(GenerationTimes))
        self._latencies, self._queued, self._first, self._later, *_ = self._times
        *_, self._prefills, self._decodes, self._inferences, self._means = self._times
        self._prompts, self._lengths = Tally(BOUNDS_TOKENS), Tally(BOUNDS_TOKENS)
        self._reasons: dict[str, int] = {"stop": 0, "length": 0}
        self._active_since: float | None = None
        self._earlier_busy_s = self._earlier_stage_s = self._earlier_active_s = 0.0

    def switched(self, stages: Sequence[StageStats]) -> None:
        """Other stages run from here on; `stages` are those that end."""
        self._earlier_busy_s += sum(stage.busy_s for stage in stages)
        self._earlier_stage_s += len(stages) * (self.active_s - self._earlier_active_s)
        self._earlier_active_s = self.active_s

    def sent(self, now: float) -> None:
        """A step was sent to the first stage."""
        if self._active_since is None:
            self._active_since = now

    def done(self, step: Step, in_flight: int, now: float) -> None:
        """A step came back; `in_flight` others have not."""
        self.steps[step.kind] += 1
        if self._active_since is not None:
            self.active_s += now - self._active_since
        self._active_since = now if in_flight else None

    def started(self, queue_s: float) -> None:
        """The first step that works on a request was sent."""
        self.queue_s.append(queue_s)
        self._queued.add(queue_s)

    def first_token(self, ttft_s: float) -> None:
        """The first token of a request came."""
        self.ttft_s.append(ttft_s)
        self._first.add(ttft_s)

    def later_tokens(self, now: float, before: Sequence[float]) -> None:
        """Tokens of first choices came; `before` are when those before them did, mostly all at once."""
        counts = dict.fromkeys(before, 0)
        if len(counts) == 1:
            counts[before[0]] = len(before)
        else:
            for at in before:
                counts[at] += 1
        for at, count in counts.items():
            self.tpot_s.extend([now - at] * count)
            self._later.add(now - at, count)

    def completed(self, completion: Completion) -> None:
        """A request has ended well."""
        self.finished += 1
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self._latencies.add(completion.total_s)
        decode_s, later = completion.total_s - completion.ttft_s, len(completion.choices[0].token_ids) - 1
        self._prefills.add(completion.ttft_s - completion.queue_s)
        self._decodes.add(decode_s)
        self._inferences.add(completion.total_s - completion.queue_s)
        if later:
            self._means.add(decode_s / later)
        self._prompts.add(completion.prompt_tokens)
        for choice in completion.choices:
            self._lengths.add(len(choice.token_ids))
            self._reasons[choice.finish_reason] += 1

    def stats(
        self, stages: Sequence[StageStats], running: int, waiting: int, cache_usage: float, set_back: int
    ) -> GenerationStats:
        """A snapshot, with what the scheduler says of the moment."""
        busy_s = self._earlier_busy_s + sum(stage.busy_s for stage in stages)
        stage_s = self._earlier_stage_s + len(stages) * (self.active_s - self._earlier_active_s)
        bubble = 1 - busy_s / stage_s if stage_s else 0.0
        return GenerationStats(
            self.slots,
            running,
            waiting,
            cache_usage,
            self.finished,
            self.failed,
            self.cancelled,
            self.prompt_tokens,
            self.cached_tokens,
            self.generated_tokens,
            self.drafted_tokens,
            self.accepted_tokens,
            self.steps["prefill"],
            self.steps["decode"],
            self.steps["mixed"],
            set_back,
            self.active_s,
            self.host_s,
            min(1.0, max(0.0, bubble)),
            Percentiles.of(list(self.queue_s)),
            Percentiles.of(list(self.ttft_s)),
            Percentiles.of(list(self.tpot_s)),
            GenerationTimes(*(tally.histogram() for tally in self._times)),
            dict(self._reasons),
            self._prompts.histogram(),
            self._lengths.histogram(),
        )

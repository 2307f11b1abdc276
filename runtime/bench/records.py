"""Benchmarks as plain data: a run, its measurements, their requests and timelines.

A **run** is one `stageline bench`. Each **measurement** in it is one contender (the pipeline, or a baseline) under one
load, repeated. Each **figure** of a measurement has one value per repeat. Requests and timelines are read separately,
because they are large.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, BeforeValidator, Field
from stageline.runtime.bench.confidence import interval
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.recorder import RequestSpan, Span

Scenario = Literal["SingleStream", "Offline", "Server", "Concurrency", "Rate", "Recorded"]
"""MLPerf's three: one request after the other, all at once, Poisson arrivals. Then a closed loop of N requests at a
time, arrivals at a rate, and arrivals from a file."""
Status = Literal["running", "done", "failed", "cancelled"]
OURS = "stageline"
"""The contender that is the bundle's own pipeline."""

LADDER = (*range(100), *(99 + tenth / 10 for tenth in range(10)), 99.95, 99.99, 100)
"""The percentiles of a ladder: each whole one, and a finer scale at the slow end."""

ANSWERED, FAILED, CANCELLED = 0, 1, 2
"""Values of `Requests.status`: how a request ended."""
UNANSWERED, CUT = "no answer in time", "cut"
"""Kinds of `Failures` of requests that were cancelled: for want of an answer, or because far more arrived than were
answered."""


@dataclass(frozen=True)
class Load:
    """What a contender is asked to do: `concurrency` requests at a time (closed loop), or `rate_per_s` (open loop).

    `pattern`: how requests arrive at that rate (`arrivals.pattern`). `ceiling`: how many an open loop leaves unfinished
    at a time; those that arrive meanwhile wait in the load generator, which counts as latency. None: no ceiling.
    """

    scenario: Scenario
    concurrency: int | None = None
    rate_per_s: float | None = None
    pattern: str = "poisson"
    ceiling: int | None = None

    def __str__(self) -> str:
        if self.scenario == "Concurrency":
            return f"{self.concurrency} at a time"
        rate = "" if self.rate_per_s is None else f" {self.rate_per_s:g}/s"
        pattern = "" if self.pattern == "poisson" else f" {self.pattern}"
        return f"{self.scenario}{rate}{pattern}{f', at most {self.ceiling} at a time' if self.ceiling else ''}"


@dataclass(frozen=True)
class Slo:
    """Bounds that a request must keep to count for goodput (None: no bound), and the share of all requests that must
    keep them for a load to hold the SLO."""

    latency_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    share: float = 0.9

    @property
    def bounded(self) -> bool:
        """Whether there is any bound."""
        return any(bound is not None for bound in (self.latency_s, self.ttft_s, self.tpot_s))


@dataclass(frozen=True)
class RunSettings:
    """How a run measures. `inputs` describes the requests in words, `rows` is the number of texts in each,
    `output_tokens` how many each draws, on average and rounded (None: the model does not generate).

    `sweep`: of a run whose loads are searched (`sweep.Sweep`), with at most `repeats` of each: what its rates have in
    common. `loads` is then empty.
    """

    loads: tuple[Load, ...]
    repeats: int
    seconds: float
    warm_up_s: float
    seed: int
    inputs: str
    rows: int
    output_tokens: int | None
    slo: Slo
    baselines: tuple[str, ...]
    pipeline: PipelineOptions
    sweep: Load | None = None


def _with_pipeline(data: Any) -> Any:
    """Settings of runs stored when the pipeline's options stood among them, with `weights` for `quantise`."""
    if not isinstance(data, dict) or "pipeline" in data:
        return data
    options = {name: data[name] for name in ("engine", "threads", "slots") if data.get(name) is not None}
    return {**data, "pipeline": {**options, "quantise": data.get("weights")}}


@dataclass(frozen=True)
class Layout:
    """How the bundle is cut: the blocks of each stage, and its cores or device."""

    blocks: tuple[int, ...]
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """Where a run took place. `commit`: the git commit if the source is a checkout, with `+` if it was changed."""

    machine: str
    cores: Annotated[int, Field(validation_alias=AliasChoices("cores", "processors"))]  # older runs: processors
    memory_bytes: int
    gpu: str | None
    system: str
    versions: dict[str, str]
    commit: str | None


@dataclass(frozen=True)
class Figure:
    """One number of a measurement: a value per repeat, their mean, and its 95 % confidence interval (Student's t over
    the repeats; None for a single repeat). `better`: which direction is better, if any."""

    unit: str
    better: Literal["higher", "lower"] | None
    values: tuple[float, ...]
    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, unit: str, better: Literal["higher", "lower"] | None, values: Sequence[float]) -> Self:
        """Build a figure from the values of its repeats, at least one."""
        bounds = interval(values)
        return cls(unit, better, tuple(values), float(np.mean(values)), *(bounds or (None, None)))

    @property
    def spread(self) -> float | None:
        """Half the interval as a share of the mean: 0.05 is ±5 %; None where it is not known."""
        return None if self.high is None or not self.mean else (self.high - self.mean) / abs(self.mean)


@dataclass(frozen=True)
class StageUsage:
    """One stage during a measurement, over all repeats: busy + copy + idle = measured seconds."""

    stage: int
    blocks: int
    device: str
    runs: int
    busy_s: float
    copy_s: float
    idle_s: float

    @property
    def utilisation(self) -> float:
        """Busy share of the measured time, 0 to 1."""
        return self.busy_s / ((self.busy_s + self.copy_s + self.idle_s) or 1.0)


@dataclass(frozen=True)
class Series:
    """Samples over time: each name has one value per entry of `at_s` (seconds since the measurement began)."""

    at_s: tuple[float, ...] = ()
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failures:
    """Requests that failed in one way. `kind`: "status 429", "timeout", ...; `sample`: the message of the first."""

    kind: str
    count: int
    sample: str


@dataclass(frozen=True)
class Measurement:
    """One contender under one load. `ladders`: "latency_s", and "ttft_s" and "tpot_s" if it generates, at each
    percentile of LADDER over all repeats, as far as they are known
    (`figures.times_s`). `notes` say what is absent, and why. `failures`: the most frequent first."""

    contender: str
    load: Load
    seconds: float
    requests: int
    figures: dict[str, Figure]
    ladders: dict[str, tuple[float, ...]] = field(default_factory=dict)
    stages: tuple[StageUsage, ...] = ()
    series: Series = Series()
    notes: tuple[str, ...] = ()
    failures: tuple[Failures, ...] = ()


@dataclass(frozen=True)
class Quality:
    """How good the answers of a run's pipeline are, on `texts` texts of `tokens` tokens.

    `reference`: what they were compared with; None: nothing. Of a model that generates, `perplexity`,
    `reference_perplexity`, and `agreement`: the share of places where both have the same likeliest next token. Of any
    other, `cosines`: of its output for each text to the reference's.
    """

    reference: str | None
    texts: int
    tokens: int
    perplexity: float | None = None
    reference_perplexity: float | None = None
    agreement: float | None = None
    cosines: tuple[float, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a run is: a share from 0 to 1, the current step, and its latest figures."""

    share: float = 0.0
    step: str = "starting"
    live: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Headline:
    """The figures of a measurement that lists show."""

    contender: str
    load: str
    requests_per_s: float | None
    tokens_per_s: float | None
    latency_p50_s: float | None
    latency_p99_s: float | None
    requests: int | None = None
    spread: float | None = None
    """Half the 95 % interval of requests/s, as a share of it."""

    @classmethod
    def of(cls, measurement: Measurement) -> Self:
        """The headline of a measurement."""
        names = ("requests_per_s", "tokens_per_s", "latency_p50_s", "latency_p99_s")
        found = [measurement.figures.get(name) for name in names]
        speed, tokens, median, slowest = (None if figure is None else figure.mean for figure in found)
        spread = found[0].spread if found[0] else None
        load, count = str(measurement.load), measurement.requests
        return cls(measurement.contender, load, speed, tokens, median, slowest, count, spread)


@dataclass(frozen=True)
class RunLine:
    """A run as lists show it, cheap to read. Times are Unix seconds."""

    id: str
    name: str
    created: float
    finished: float | None
    bundle: str
    bundle_digest: str
    status: Status
    error: str | None
    progress: Progress
    headlines: tuple[Headline, ...]
    checkpoint: str = ""


@dataclass(frozen=True)
class Run:
    """A run with all its measurements. `bundle_digest`: SHA-256 of the manifest, which pins every file. `checkpoint`:
    what all cuts of one model share (`options.checkpoint_digest`); "" in runs of before it was kept."""

    id: str
    name: str
    created: float
    bundle: str
    bundle_digest: str
    model: str
    task: str
    dtype: str
    settings: Annotated[RunSettings, BeforeValidator(_with_pipeline)]
    plan: Layout
    environment: Environment
    status: Status = "running"
    error: str | None = None
    finished: float | None = None
    progress: Progress = Progress()
    measurements: tuple[Measurement, ...] = ()
    checkpoint: str = ""
    quality: Quality | None = None


@dataclass(frozen=True)
class Requests:
    """The requests of a measurement as columns of equal length, ordered by intended arrival.

    `intended_s`: when a request should have been sent, in seconds since its repeat began. The other times count from
    there: when it was sent, its first token (NaN: none), its end. Latency thus includes the wait to be sent.
    """

    repeat: npt.NDArray[np.uint16]
    intended_s: npt.NDArray[np.float64]
    sent_s: npt.NDArray[np.float32]
    first_token_s: npt.NDArray[np.float32]
    latency_s: npt.NDArray[np.float32]
    tokens_in: npt.NDArray[np.uint32]
    tokens_out: npt.NDArray[np.uint32]
    status: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.intended_s)

    @classmethod
    def join(cls, parts: Sequence["Requests"]) -> Self:
        """Concatenate requests."""
        return cls(
            *(np.concatenate([np.empty(0, dtype), *(getattr(p, name) for p in parts)]) for name, dtype in COLUMNS)
        )

    @property
    def tpot_s(self) -> npt.NDArray[np.float32]:
        """Time per token after the first; NaN if there are fewer than two tokens."""
        after = np.where(self.tokens_out > 1, self.tokens_out - np.float32(1), np.float32(np.nan))
        return ((self.latency_s - self.first_token_s) / after).astype(np.float32)


COLUMNS: tuple[tuple[str, npt.DTypeLike], ...] = (
    ("repeat", np.uint16),
    ("intended_s", np.float64),
    ("sent_s", np.float32),
    ("first_token_s", np.float32),
    ("latency_s", np.float32),
    ("tokens_in", np.uint32),
    ("tokens_out", np.uint32),
    ("status", np.uint8),
)
assert [name for name, _ in COLUMNS] == [f.name for f in fields(Requests)]


@dataclass(frozen=True)
class Timeline:
    """The stages' work during a measurement, sampled in windows; times in seconds since it began."""

    spans: tuple[Span, ...] = ()
    requests: tuple[RequestSpan, ...] = ()


def ladder(values: npt.NDArray[np.floating]) -> tuple[float, ...]:
    """The value at each percentile of LADDER, without NaN, as far as it is finite; empty if there are no values."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ()
    with np.errstate(invalid="ignore"):  # between two infinite values
        found = np.percentile(known, LADDER)
    return tuple(itertools.takewhile(math.isfinite, found.tolist()))

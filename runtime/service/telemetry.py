"""OpenTelemetry: a trace of each request, and metrics, by the semantic conventions for generative AI.

    chat llama                 the HTTP request, within the trace that its `traceparent` names
    ├─ queue                   from submission to the first step that works on it
    ├─ prefill                 from there to the first token
    ├─ decode                  from there to the last token
    ├─ stage 0                 from the stage's first run for it to its last; stageline.stage.busy_s: in the engine
    └─ stage 1 ...             (what a stage does for several requests at once counts for each)

Names: OpenTelemetry's GenAI spans and metrics, whose buckets these are. Needs the extra `otel`.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Self

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from stageline.runtime.generation.request import Completion, GenerationRequest
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.limits import OPEN_TO_ALL, route_of
from stageline.runtime.service.noted import NOTED, Noted
from stageline.runtime.stages.recorder import Recordable, Recorder
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PROVIDER = "stageline"
_OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}  # fmt: skip
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_KEPT = 10_000  # requests whose stages' times are kept until they are asked for


@dataclass
class _StageTime:
    began_s: float
    ended_s: float = 0.0
    busy_s: float = 0.0
    runs: int = 0


class StageTimes(Recorder):
    """What each stage did for each of the latest requests that generate. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._times: OrderedDict[int, dict[int, _StageTime]] = OrderedDict()

    def ran(self, stage: int, began_s: float, ended_s: float, work: Recordable, copying: bool = False) -> None:
        """See Recorder."""
        kind, _, _, requests = work.traced()
        if kind == "batch" or copying:
            return
        with self._guard:
            for number in requests:
                found = self._times.setdefault(number, {}).setdefault(stage, _StageTime(began_s))
                found.ended_s = ended_s
                found.busy_s += ended_s - began_s
                found.runs += 1
            while len(self._times) > _KEPT:
                self._times.popitem(last=False)

    def ended(self, number: int, began_s: float, ended_s: float) -> None:
        """See Recorder; nothing is kept of it."""

    def taken(self, number: int) -> Mapping[int, _StageTime]:
        """What is known of a request that has ended; it is forgotten."""
        with self._guard:
            return self._times.pop(number, {})


@dataclass(frozen=True)
class Telemetry:
    """Where spans and metrics go. Owns both providers until `close`, which sends what waits."""

    traces: TracerProvider
    metrics: MeterProvider
    stages: dict[str, StageTimes] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: SpanProcessor, reader: MetricReader) -> Self:
        """Through these."""
        resource = Resource.create({SERVICE_VERSION: version("stageline")})
        if not os.environ.get("OTEL_SERVICE_NAME"):
            resource = resource.merge(Resource({SERVICE_NAME: "stageline"}))
        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        traces.add_span_processor(processor)
        return cls(traces, MeterProvider([reader], resource, shutdown_on_exit=False))

    @classmethod
    def over_http(cls, endpoint: str | None) -> Self:
        """To a collector that speaks OTLP over HTTP, at a URL such as http://localhost:4318; None: as the standard
        variables OTEL_EXPORTER_OTLP_... say, which also set headers, sampling and so on."""
        base = None if endpoint is None else endpoint.rstrip("/")
        spans = OTLPSpanExporter(None if base is None else f"{base}/v1/traces")
        metrics = OTLPMetricExporter(None if base is None else f"{base}/v1/metrics")
        return cls.of(BatchSpanProcessor(spans), PeriodicExportingMetricReader(metrics))

    def watch(self, pipelines: Mapping[str, Pipeline]) -> None:
        """Have these pipelines report the times of their stages."""
        for name, pipeline in pipelines.items():
            self.stages[name] = StageTimes()
            pipeline.record(self.stages[name])

    def close(self) -> None:
        """Send what waits, and end."""
        self.traces.shutdown()
        self.metrics.shutdown()


class TelemetryMiddleware:
    """Makes a trace and metrics of each request but those of probes and for metrics."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry
        self._tracer = telemetry.traces.get_tracer("stageline", version("stageline"))
        meter = telemetry.metrics.get_meter("stageline", version("stageline"))
        self._duration, self._ttft, self._tpot = (
            meter.create_histogram(f"gen_ai.server.{name}", "s", said, explicit_bucket_boundaries_advisory=bounds)
            for name, said, bounds in (
                ("request.duration", "Time to the last byte of a response.", _DURATION_S),
                ("time_to_first_token", "Time to the first token of a successful response.", _TTFT_S),
                ("time_per_output_token", "Time per token after the first of a successful response.", _TPOT_S),
            )
        )
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or route_of(scope) in OPEN_TO_ALL:
            return await self._app(scope, receive, send)
        began_s, status, noted = time.perf_counter(), 0, Noted()
        operation = _OPERATIONS.get(route_of(scope))
        given = {"http.request.method": scope["method"], "url.path": scope["path"]}
        context = self._propagator.extract(Headers(scope=scope))
        name = operation or scope["method"]
        span = self._tracer.start_span(name, context, SpanKind.SERVER, given, start_time=self._ns(began_s))

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        token = NOTED.set(noted)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, seen)
        finally:
            NOTED.reset(token)
            self._end(span, operation, status, noted, began_s)

    def _end(self, span: Span, operation: str | None, status: int, noted: Noted, began_s: float) -> None:
        ended_s = time.perf_counter()
        told: dict[str, Any] = {"gen_ai.provider.name": _PROVIDER}
        if operation is not None:
            told["gen_ai.operation.name"] = operation
        if noted.model is not None:
            told |= {"gen_ai.request.model": noted.model, "gen_ai.response.model": noted.model}
            span.update_name(f"{operation or 'request'} {noted.model}")
        if not 0 < status < 500:
            told["error.type"] = str(status or "disconnected")
            span.set_status(StatusCode.ERROR)
        if status:
            span.set_attribute("http.response.status_code", status)
        span.set_attributes(told)
        done = [(request, generation.future) for request, generation in noted.generations]
        ends = [
            (request, future.result())
            for request, future in done
            if future.done() and not future.cancelled() and future.exception() is None
        ]
        if noted.generations:
            span.set_attributes(_asked(noted.generations[0][0]))
        span.set_attributes(_used([end for _, end in ends]))
        for _, end in ends:
            self._parts(span, end, noted.model or "")
            self._ttft.record(end.ttft_s, told)
            later = len(end.choices[0].token_ids) - 1
            if later:
                self._tpot.record((end.total_s - end.ttft_s) / later, told)
        if operation is not None:
            self._duration.record(ended_s - began_s, told)
        span.end(self._ns(ended_s))

    def _parts(self, parent: Span, end: Completion, model: str) -> None:
        """The spans of a generation."""
        context, at = trace.set_span_in_context(parent), end.submitted_s

        def part(name: str, began_s: float, ended_s: float, **told: Any) -> None:
            attributes = {f"stageline.{key}": value for key, value in told.items()}
            span = self._tracer.start_span(name, context, attributes=attributes, start_time=self._ns(began_s))
            span.end(self._ns(ended_s))

        part("queue", at, at + end.queue_s)
        part("prefill", at + end.queue_s, at + end.ttft_s, prompt_tokens=end.prompt_tokens)
        part("decode", at + end.ttft_s, at + end.total_s, completion_tokens=end.completion_tokens)
        times = self._telemetry.stages[model].taken(end.number) if model in self._telemetry.stages else {}
        for stage, one in sorted(times.items()):
            told = {"stage.busy_s": one.busy_s, "stage.runs": one.runs}
            part(f"stage {stage}", one.began_s, one.ended_s, **told)

    def _ns(self, seconds: float) -> int:
        """A time of `perf_counter` since the epoch."""
        return self._epoch_ns + int(seconds * 1e9)


def _asked(request: GenerationRequest) -> dict[str, Any]:
    sampling = request.sampling
    asked: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "stop_sequences": sampling.stop,
        "choice.count": sampling.n if sampling.n > 1 else None,
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


def _used(ends: Sequence[Completion]) -> dict[str, Any]:
    if not ends:
        return {}
    return {
        "gen_ai.usage.input_tokens": sum(end.prompt_tokens for end in ends),
        "gen_ai.usage.output_tokens": sum(end.completion_tokens for end in ends),
        "gen_ai.usage.cache_read.input_tokens": sum(end.cached_tokens for end in ends),
        "gen_ai.response.finish_reasons": [choice.finish_reason for end in ends for choice in end.choices],
    }

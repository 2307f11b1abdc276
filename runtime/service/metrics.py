"""/metrics: the pipelines' stats and the service's responses in Prometheus' text format.

Where vLLM reports the same thing, its name follows our prefix; `vllm_metrics` reports it under vLLM's own as well.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from stageline.runtime.generation.meter import GenerationStats, GenerationTimes
from stageline.runtime.pipeline import PipelineStats
from stageline.runtime.service.event_loop import EventLoopDelay
from stageline.runtime.service.limits import OPEN_TO_ALL, route_of
from stageline.runtime.service.model import Model
from stageline.runtime.service.vllm_metrics import buckets, vllm_metrics
from stageline.runtime.times import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = OPEN_TO_ALL | {
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/rerank", "/v1/rerank", "/v2/rerank",
    "/score", "/classify", "/tokenize", "/detokenize", "/version", "/load",
}  # fmt: skip
_DISCONNECTED = 499  # the client disconnected before the response started


class ResponseCounter:
    """Numbers of responses, by route and status."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()


class CountingMiddleware:
    """ASGI middleware that counts responses."""

    def __init__(self, app: ASGIApp, responses: ResponseCounter) -> None:
        self._app, self._responses = app, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count its status."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = _DISCONNECTED

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = route_of(scope)
            self._responses.counts[route if route in ROUTES else "other", status] += 1


class ServiceCollector(Collector):
    """Collects the metrics when Prometheus asks for them."""

    def __init__(self, models: Sequence[Model], responses: ResponseCounter, delay: EventLoopDelay) -> None:
        self._models, self._responses, self._delay = models, responses, delay

    def collect(self) -> Iterator[Metric]:
        """All metrics. Those of a pipeline have a label `model`."""
        responses = CounterMetricFamily(
            "stageline_http_requests",
            "Responses by status; 499: the client disconnected first.",
            labels=["route", "status"],
        )
        for (route, status), count in sorted(self._responses.counts.items()):
            responses.add_metric([route, str(status)], count)
        yield responses
        late, name = self._delay.histogram, "stageline_event_loop_delay_seconds"
        yield HistogramMetricFamily(name, "How late the event loop is.", buckets(late, late.bounds), late.total)
        stats = [(model.name, model.pipeline.stats()) for model in self._models]
        yield _requests(stats)
        yield from _stages(stats)
        yield from _switches(stats)
        generation = [(name, s.generation) for name, s in stats if s.generation is not None]
        for name, (help_text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"stageline_{name}", help_text, labels=["model"])
            for model, s in generation:
                gauge.add_metric([model], value(s))
            yield gauge
        for name, (help_text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"stageline_{name}", help_text, labels=["model"])
            for model, s in generation:
                counter.add_metric([model], value(s))
            yield counter
        latencies = {model: s.generation.times.latency if s.generation else s.latency for model, s in stats}
        yield _times("e2e_request_latency", "From submission to the end of a request.", latencies)
        for name, (help_text, times) in _TIMES.items():
            yield _times(name, help_text, {model: times(s.times) for model, s in generation})
        yield from vllm_metrics(stats)


_GAUGES: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "slots": ("Sequences that can be generated at a time.", lambda s: s.slots),
    "num_requests_running": ("Sequences being generated.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait for a slot.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Share of the KV cache that running sequences fill, 0 to 1.", lambda s: s.cache_usage),
    "bubble_ratio": ("Share of stage time that was idle while steps were running.", lambda s: s.bubble_ratio),
}
_COUNTERS: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "prompt_tokens": ("Prompt tokens of finished requests.", lambda s: s.prompt_tokens),
    "cached_tokens": ("Prompt tokens found in the cache.", lambda s: s.cached_tokens),
    "generation_tokens": ("Generated tokens.", lambda s: s.generated_tokens),
    "prefill_steps": ("Steps that read prompts.", lambda s: s.prefill_steps),
    "decode_steps": ("Steps that generate one token per running sequence.", lambda s: s.decode_steps),
    "mixed_steps": ("Steps that do both.", lambda s: s.mixed_steps),
    "drafted_tokens": ("Tokens that steps computed as drafts.", lambda s: s.drafted_tokens),
    "accepted_tokens": ("Those of them that were right.", lambda s: s.accepted_tokens),
    "num_preemptions": ("Sequences that gave their part of the cache to an older one.", lambda s: s.set_back),
    "host_seconds": ("Time of the thread that schedules and samples.", lambda s: s.host_s),
}
_TIMES: dict[str, tuple[str, Callable[[GenerationTimes], Histogram]]] = {
    "request_queue_time": ("From submission to the first step.", lambda t: t.queue),
    "time_to_first_token": ("From submission to the first token.", lambda t: t.ttft),
    "inter_token_latency": ("Between the tokens of a request.", lambda t: t.tpot),
    "request_prefill_time": ("From the first step to the first token.", lambda t: t.prefill),
    "request_decode_time": ("From the first token to the last one.", lambda t: t.decode),
}


def _times(name: str, help_text: str, found: Mapping[str, Histogram]) -> Metric:
    """A histogram in seconds, by model."""
    family = HistogramMetricFamily(f"stageline_{name}_seconds", help_text, labels=["model"])
    for model, times in found.items():
        family.add_metric([model], buckets(times, times.bounds), times.total)
    return family


def _requests(stats: Sequence[tuple[str, PipelineStats]]) -> Metric:
    requests = CounterMetricFamily(
        "stageline_requests", "Requests to the pipeline that ended.", labels=["model", "outcome"]
    )
    for name, s in stats:
        counted = s.generation or s
        for outcome in ("done", "failed", "cancelled"):
            requests.add_metric([name, outcome], getattr(counted, outcome))
    return requests


def _stages(stats: Sequence[tuple[str, PipelineStats]]) -> Iterator[Metric]:
    labels = ["model", "stage"]
    utilisation = GaugeMetricFamily("stageline_stage_utilisation", "Busy time over wall time, 0 to 1.", labels=labels)
    busy = CounterMetricFamily("stageline_stage_busy_seconds", "Time in the engine.", labels=labels)
    copy = CounterMetricFamily("stageline_stage_copy_seconds", "Time of copies into the stage.", labels=labels)
    runs = CounterMetricFamily("stageline_stage_runs", "Runs of the engine.", labels=labels)
    blocks = GaugeMetricFamily("stageline_stage_blocks", "Blocks of the model in the stage.", labels=labels)
    for name, s in stats:
        for number, stage in enumerate(s.stages):
            utilisation.add_metric([name, str(number)], stage.utilisation)
            busy.add_metric([name, str(number)], stage.busy_s)
            copy.add_metric([name, str(number)], stage.copy_s)
            runs.add_metric([name, str(number)], stage.runs)
        for number, layers in enumerate(s.layers):
            blocks.add_metric([name, str(number)], layers)
    yield from (utilisation, busy, copy, runs, blocks)


def _switches(stats: Sequence[tuple[str, PipelineStats]]) -> Iterator[Metric]:
    switches = CounterMetricFamily("stageline_switches", "Changeovers to other stages.", labels=["model"])
    pause = GaugeMetricFamily("stageline_switch_pause_seconds", "Pause of the latest changeover.", labels=["model"])
    gain = GaugeMetricFamily(
        "stageline_rebalance_gain",
        "Throughput that the advised cut would add, as a share; 0: none.",
        labels=["model"],
    )
    for name, s in stats:
        switches.add_metric([name], s.changeovers)
        pause.add_metric([name], s.last_changeover.pause_s if s.last_changeover is not None else 0.0)
        if s.rebalance is not None:
            gain.add_metric([name], s.rebalance.advice.gain if s.rebalance.advice is not None else 0.0)
    yield from (switches, pause, gain)

"""/metrics: what the pipelines' stats and the answers of the service say, in Prometheus' text format."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from stageline.runtime.generation.meter import GenerationStats
from stageline.runtime.pipeline import PipelineStats
from stageline.runtime.service.limits import OPEN_TO_ALL, route_of
from stageline.runtime.service.model import Model
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = OPEN_TO_ALL | {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"}
_GONE = 499  # the client went away before an answer began


class AnswerCounter:
    """How many requests were answered, by route and status."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()


class Counted:
    """Middleware that counts into `answers`."""

    def __init__(self, app: ASGIApp, answers: AnswerCounter) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note the status of its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = _GONE

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = route_of(scope)
            self._answers.counts[route if route in ROUTES else "other", status] += 1


class ServiceCollector(Collector):
    """Reads everything at the moment of the scrape."""

    def __init__(self, models: Sequence[Model], answers: AnswerCounter) -> None:
        self._models, self._answers = models, answers

    def collect(self) -> Iterator[Metric]:
        """All metrics; those of a pipeline have a label `model`."""
        answers = CounterMetricFamily(
            "stageline_http_requests", "Answers by status; 499: the client went first.", labels=["route", "status"]
        )
        for (route, status), count in sorted(self._answers.counts.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
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
        for name, help_text in _TIMES.items():
            times = GaugeMetricFamily(f"stageline_{name}_seconds", help_text, labels=["model", "quantile"])
            for model, s in generation:
                percentiles = getattr(s, f"{name}_s")
                for quantile in ("50", "90", "99"):
                    times.add_metric([model, f"0.{quantile.rstrip('0')}"], getattr(percentiles, f"p{quantile}"))
            yield times


_GAUGES: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "slots": ("Continuations that can run at a time.", lambda s: s.slots),
    "slots_running": ("Continuations that run.", lambda s: s.running),
    "queue_waiting": ("Continuations that wait for a slot.", lambda s: s.waiting),
    "bubble_ratio": ("Share of stage time that was idle while steps were under way.", lambda s: s.bubble_ratio),
}
_COUNTERS: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "prompt_tokens": ("Tokens of the prompts of requests that are done.", lambda s: s.prompt_tokens),
    "cached_tokens": ("Prompt tokens that were in the cache already.", lambda s: s.cached_tokens),
    "generated_tokens": ("Tokens drawn.", lambda s: s.generated_tokens),
    "prefill_steps": ("Steps that read prompts.", lambda s: s.prefill_steps),
    "decode_steps": ("Steps that draw a token for each running continuation.", lambda s: s.decode_steps),
    "host_seconds": ("Time of the thread that schedules and samples.", lambda s: s.host_s),
}
_TIMES = {
    "queue": "From submission to the first step, of the latest requests.",
    "ttft": "Time to first token, of the latest requests.",
    "tpot": "Time per output token after the first, of the latest tokens.",
}


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
    runs = CounterMetricFamily("stageline_stage_runs", "Runs of the engine.", labels=labels)
    blocks = GaugeMetricFamily("stageline_stage_blocks", "Blocks of the model in the stage.", labels=labels)
    for name, s in stats:
        for number, stage in enumerate(s.stages):
            utilisation.add_metric([name, str(number)], stage.utilisation)
            busy.add_metric([name, str(number)], stage.busy_s)
            runs.add_metric([name, str(number)], stage.runs)
        for number, layers in enumerate(s.layers):
            blocks.add_metric([name, str(number)], layers)
    yield from (utilisation, busy, runs, blocks)


def _switches(stats: Sequence[tuple[str, PipelineStats]]) -> Iterator[Metric]:
    switches = CounterMetricFamily("stageline_switches", "Changes to other stages.", labels=["model"])
    pause = GaugeMetricFamily(
        "stageline_switch_pause_seconds", "Of the latest change to other stages.", labels=["model"]
    )
    gain = GaugeMetricFamily(
        "stageline_rebalance_gain", "Throughput that the advised cut would add, as a share; 0: none.", labels=["model"]
    )
    for name, s in stats:
        switches.add_metric([name], s.changeovers)
        pause.add_metric([name], s.last_changeover.pause_s if s.last_changeover is not None else 0.0)
        if s.rebalance is not None:
            gain.add_metric([name], s.rebalance.advice.gain if s.rebalance.advice is not None else 0.0)
    yield from (switches, pause, gain)

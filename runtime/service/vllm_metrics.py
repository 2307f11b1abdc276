"""What vLLM reports too, under its names, labels and bounds: its boards and inference gateways read these as they are.

Names: vLLM's production metrics. Gateways read the queue, the running requests and the KV cache's use (the model server
protocol of the Gateway API inference extension). What vLLM gives to each of several engines has the label engine="0".
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString
from stageline.runtime.generation.meter import GenerationStats
from stageline.runtime.pipeline import PipelineStats
from stageline.runtime.times import BOUNDS_TOKENS, Histogram

_LABELS = ("model_name", "engine")
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_TPOT_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_GAUGES: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "kv_cache_usage_perc": ("Share of the KV cache in use, 0 to 1.", lambda s: s.cache_usage),
    "gpu_cache_usage_perc": ("The older name of kv_cache_usage_perc.", lambda s: s.cache_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[GenerationStats], float]]] = {
    "prompt_tokens": ("Prompt tokens of finished requests.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Generated tokens.", lambda s: s.generated_tokens),
    "num_preemptions": ("Sequences that were set back.", lambda s: s.set_back),
    "spec_decode_num_draft_tokens": ("Tokens computed as drafts.", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Those of them that were right.", lambda s: s.accepted_tokens),
    "prefix_cache_queries": ("Prompt tokens that were looked up in the cache.", lambda s: s.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens that were found there.", lambda s: s.cached_tokens),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], Callable[[GenerationStats], Histogram]]] = {
    "time_to_first_token_seconds": ("To the first token.", _TTFT_S, lambda s: s.times.ttft),
    "inter_token_latency_seconds": ("Between tokens.", _TPOT_S, lambda s: s.times.tpot),
    "time_per_output_token_seconds": ("The older name of inter_token_latency.", _TPOT_S, lambda s: s.times.tpot),
    "request_time_per_output_token_seconds": ("Its mean in a request.", _TPOT_S, lambda s: s.times.mean_tpot),
    "request_queue_time_seconds": ("Of a request in the queue.", _REQUEST_S, lambda s: s.times.queue),
    "request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST_S, lambda s: s.times.prefill),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST_S, lambda s: s.times.decode),
    "request_inference_time_seconds": ("From the first step to the end.", _REQUEST_S, lambda s: s.times.inference),
    "request_prompt_tokens": ("Tokens of a prompt.", BOUNDS_TOKENS, lambda s: s.prompt_length),
    "request_generation_tokens": ("Tokens generated.", BOUNDS_TOKENS, lambda s: s.length),
}


def vllm_metrics(stats: Sequence[tuple[str, PipelineStats]]) -> Iterator[Metric]:
    """The metrics of pipelines by name. Those that do not generate have requests and latencies only."""
    running = GaugeMetricFamily("vllm:num_requests_running", "Requests that run.", labels=_LABELS)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait.", labels=_LABELS)
    latency = HistogramMetricFamily("vllm:e2e_request_latency_seconds", "Of whole requests.", labels=_LABELS)
    ended = CounterMetricFamily("vllm:request_success", "Ended, by the reason.", labels=[*_LABELS, "finished_reason"])
    for name, s in stats:
        runs, waits = (
            (s.generation.running, s.generation.waiting) if s.generation else (s.in_flight - s.queued, s.queued)
        )
        running.add_metric([name, "0"], runs)
        waiting.add_metric([name, "0"], waits)
        times = s.generation.times.latency if s.generation else s.latency
        latency.add_metric([name, "0"], buckets(times, _REQUEST_S), times.total)
        counted = s.generation or s
        reasons: dict[str, int] = {"abort": counted.cancelled, "error": counted.failed}
        reasons.update(s.generation.finished if s.generation else {"stop": s.done})
        for reason, count in reasons.items():
            ended.add_metric([name, "0", reason], count)
    yield from (running, waiting, latency, ended)
    generation = [(name, s.generation) for name, s in stats if s.generation is not None]
    for title, (help_text, value) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"vllm:{title}", help_text, labels=_LABELS)
        for name, g in generation:
            gauge.add_metric([name, "0"], value(g))
        yield gauge
    for title, (help_text, value) in _COUNTERS.items():
        counter = CounterMetricFamily(f"vllm:{title}", help_text, labels=_LABELS)
        for name, g in generation:
            counter.add_metric([name, "0"], value(g))
        yield counter
    for title, (help_text, bounds, of) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"vllm:{title}", help_text, labels=_LABELS)
        for name, g in generation:
            family.add_metric([name, "0"], buckets(of(g), bounds), of(g).total)
        yield family


def buckets(histogram: Histogram, bounds: Sequence[float]) -> list[tuple[str, float]]:
    """What lies at or below each of `bounds`, which are all among the histogram's own, and in all."""
    below = list(itertools.accumulate(histogram.counts))
    at = dict(zip(histogram.bounds, below, strict=False))
    return [*zip(map(floatToGoString, bounds), (at[bound] for bound in bounds), strict=True), ("+Inf", below[-1])]

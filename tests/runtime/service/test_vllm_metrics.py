"""What boards for vLLM and inference gateways read, compared with what really happened."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stageline.runtime.service import vllm_metrics

Serve = Callable[..., AbstractContextManager[Any]]
STEP_S = 0.02
LABELS = {"model_name": "llama", "engine": "0"}
REQUESTS = (("a cat sat", 5), ("a dog ran on mats " * 8, 9), ("a dog ran on mats " * 8, 3), ("a", 1))


def samples(service: Any) -> dict[tuple[str, str, str], float]:
    """(name, finished_reason or le, model) -> value, of vLLM's names."""
    found = {}
    for family in text_string_to_metric_families(service.client.get("/metrics").text):
        for one in family.samples:
            if one.name.startswith("vllm:"):
                assert one.labels["engine"] == "0"
                detail = one.labels.get("finished_reason", one.labels.get("le", ""))
                found[one.name, detail, one.labels["model_name"]] = one.value
    return found


@pytest.fixture(scope="module")
def measured(serve: Serve) -> Iterator[tuple[dict[tuple[str, str, str], float], Counter[str], list[float]]]:
    """The metrics of a service that has answered REQUESTS one by one, in steps of STEP_S; the usage that it stated, and
    the seconds that its client measured."""
    with serve() as service:
        service.faults.step = lambda stage, inputs, outputs: time.sleep(STEP_S / 2)  # two stages
        seconds, usage = [], Counter[str]()
        for prompt, tokens in REQUESTS:
            began = time.perf_counter()
            body = {"model": "llama", "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens}
            used = service.post("completions", **body).json()["usage"]
            usage.update(prompt=used["prompt_tokens"], cached=used["prompt_tokens_details"]["cached_tokens"])
            seconds.append(time.perf_counter() - began)
        assert service.post("embeddings", model="bert", input=["a", "cat"]).status_code == 200
        yield samples(service), usage, seconds


def value(found: dict[tuple[str, str, str], float], name: str, detail: str = "", model: str = "llama") -> float:
    return found[f"vllm:{name}", detail, model]


def test_counts_are_those_of_the_requests(measured: Any) -> None:
    found, usage, _ = measured
    tokens = [tokens for _, tokens in REQUESTS]
    read = value(found, "prompt_tokens_total")
    assert read == usage["prompt"]
    assert value(found, "generation_tokens_total") == sum(tokens)
    assert value(found, "request_success_total", "length") == len(REQUESTS)
    for reason in ("stop", "abort", "error"):
        assert value(found, "request_success_total", reason) == 0
    assert value(found, "request_success_total", "stop", "bert") == 1
    assert value(found, "prefix_cache_queries_total") == read
    assert value(found, "prefix_cache_hits_total") == usage["cached"]
    assert 30 < usage["cached"] < read  # one prompt came twice
    for name, lengths in (("request_prompt_tokens", None), ("request_generation_tokens", tokens)):
        assert value(found, f"{name}_count") == len(REQUESTS)
        assert value(found, f"{name}_sum") == (read if lengths is None else sum(lengths))
    for bound in (1, 2, 5, 10):
        assert value(found, "request_generation_tokens_bucket", f"{bound}.0") == sum(one <= bound for one in tokens)
    for name in ("num_requests_running", "num_requests_waiting"):
        assert value(found, name) == value(found, name, model="bert") == 0
    assert value(found, "kv_cache_usage_perc") == value(found, "gpu_cache_usage_perc") == 0


def test_times_are_those_of_the_stages_and_add_up(measured: Any) -> None:
    found, _, seconds = measured
    tokens = [tokens for _, tokens in REQUESTS]
    total, queue, prefill, decode, inference = (
        value(found, f"{name}_seconds_sum")
        for name in (
            "e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time",
            "request_inference_time",
        )
    )  # fmt: skip
    assert total == pytest.approx(queue + prefill + decode)
    assert inference == pytest.approx(prefill + decode)
    assert value(found, "time_to_first_token_seconds_sum") == pytest.approx(queue + prefill)
    assert total < sum(seconds)
    assert prefill >= len(REQUESTS) * STEP_S
    assert decode >= (sum(tokens) - len(tokens)) * STEP_S
    assert decode == pytest.approx(value(found, "inter_token_latency_seconds_sum"), rel=0.01)
    gaps = sum(tokens) - len(tokens)
    for name in ("inter_token_latency", "time_per_output_token"):
        assert value(found, f"{name}_seconds_count") == value(found, f"{name}_seconds_bucket", "+Inf") == gaps
        assert value(found, f"{name}_seconds_bucket", "0.01") == 0  # none was faster than the stages
    assert value(found, "request_time_per_output_token_seconds_count") == sum(one > 1 for one in tokens)
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "time_to_first_token"):
        assert value(found, f"{name}_seconds_count") == len(REQUESTS)
    assert value(found, "e2e_request_latency_seconds_count", model="bert") == 1


def test_what_runs_and_what_waits_is_seen(serve: Serve) -> None:
    with serve(slots=1) as service:
        service.faults.step = lambda stage, inputs, outputs: time.sleep(STEP_S)
        body = {"model": "llama", "prompt": "a", "min_tokens": 200, "max_tokens": 200}
        with service.stream("completions", **body) as first:
            lines = first.iter_lines()  # kept: the response ends with it
            next(lines)
            body["prompt"] = ["cat", "dog"]

            def ask() -> None:
                with service.stream("completions", **body) as second:
                    next(iter(second.iter_lines()))

            waiting = threading.Thread(target=ask)
            waiting.start()
            deadline = time.monotonic() + 10
            while value(now := samples(service), "num_requests_waiting") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert value(now, "num_requests_running") == 1
            assert value(now, "kv_cache_usage_perc") > 0
        waiting.join(10)
        deadline = time.monotonic() + 10
        while value(now := samples(service), "request_success_total", "abort") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert value(now, "num_requests_running") == 0


def test_bounds_are_vllms_and_each_is_exact(measured: Any) -> None:
    """A query for one of vLLM's bounds (a share below an objective) finds it."""
    found, _, _ = measured
    for name, bounds in (
        ("time_to_first_token_seconds", vllm_metrics._TTFT_S),
        ("inter_token_latency_seconds", vllm_metrics._TPOT_S),
        ("e2e_request_latency_seconds", vllm_metrics._REQUEST_S),
    ):
        below = [value(found, f"{name}_bucket", str(float(bound))) for bound in bounds]
        assert below == sorted(below)
        assert below[-1] == value(found, f"{name}_count")

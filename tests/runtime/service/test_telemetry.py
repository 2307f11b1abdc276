"""Traces and metrics of OpenTelemetry, as a collector would get them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from stageline.runtime.service.telemetry import Telemetry

Serve = Callable[..., AbstractContextManager[Any]]
STEP_S = 0.01
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
BODY = {"model": "llama", "prompt": "a cat", "max_tokens": 6, "min_tokens": 6, "temperature": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def observed(serve: Serve) -> Iterator[tuple[Any, Callable[[], list[Any]], InMemoryMetricReader]]:
    """A service, what gives the spans that have ended since it was last called, and its metrics."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    telemetry = Telemetry.of(SimpleSpanProcessor(exporter), reader)
    with serve(telemetry=telemetry) as service:
        service.faults.step = lambda stage, inputs, outputs: time.sleep(STEP_S)

        def ended() -> list[Any]:
            deadline = time.monotonic() + 10
            while not any(span.kind == SpanKind.SERVER for span in exporter.get_finished_spans()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            spans = list(exporter.get_finished_spans())
            exporter.clear()
            return spans

        yield service, ended, reader
    telemetry.close()


def seconds(span: Any) -> float:
    return float(span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
def test_spans_nest_and_add_up(observed: Any, stream: bool) -> None:
    service, ended, _ = observed
    headers, wall_s = {"traceparent": f"00-{TRACE}-{PARENT}-01"}, time.time()
    answer = service.client.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers)
    assert answer.status_code == 200
    *parts, whole = ended()
    assert format(whole.context.trace_id, "032x") == TRACE
    assert format(whole.parent.span_id, "016x") == PARENT
    assert (whole.name, whole.kind) == ("text_completion llama", SpanKind.SERVER)
    assert abs(whole.start_time / 1e9 - wall_s) < 1
    told = whole.attributes
    expected = {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "stageline",
        "gen_ai.request.model": "llama", "gen_ai.request.max_tokens": 6, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3, "gen_ai.usage.output_tokens": 6, "gen_ai.response.finish_reasons": ("length",),
        "http.request.method": "POST", "http.response.status_code": 200, "url.path": "/v1/completions",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    if not stream:
        assert told["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    named = {span.name: span for span in parts}
    assert list(named) == ["queue", "prefill", "decode", "stage 0", "stage 1"]
    for span in parts:
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    queue, prefill, decode = (named[name] for name in ("queue", "prefill", "decode"))
    assert abs(queue.end_time - prefill.start_time) < 1000  # ns
    assert abs(prefill.end_time - decode.start_time) < 1000
    assert decode.attributes["stageline.completion_tokens"] == 6
    assert seconds(prefill) >= 2 * STEP_S
    assert seconds(decode) >= 5 * 2 * STEP_S
    busy_s = 0.0
    for number in (0, 1):
        stage = named[f"stage {number}"]
        assert prefill.start_time <= stage.start_time
        assert stage.end_time <= decode.end_time
        assert stage.attributes["stageline.stage.runs"] == 6
        assert 6 * STEP_S <= stage.attributes["stageline.stage.busy_s"] <= seconds(stage)
        busy_s += stage.attributes["stageline.stage.busy_s"]
    assert busy_s <= seconds(prefill) + seconds(decode)  # one request: its stages take turns
    assert busy_s >= 0.7 * (seconds(prefill) + seconds(decode))


def test_what_fails_and_what_is_no_generation(observed: Any) -> None:
    service, ended, _ = observed
    for method, path, body, status, name in (
        ("POST", "/v1/embeddings", {"model": "bert", "input": "a"}, 200, "embeddings bert"),
        ("POST", "/v1/completions", {"model": "gpt", "prompt": "a"}, 404, "text_completion"),
        ("GET", "/v1/models", None, 200, "GET"),
    ):
        assert service.client.request(method, path, json=body).status_code == status
        (span,) = ended()
        assert (span.name, span.attributes["http.response.status_code"]) == (name, status)
        assert span.parent is None
        assert span.status.status_code == StatusCode.UNSET
    before = service.faults.step

    def fail(stage: int, inputs: Any, outputs: Any) -> None:
        raise ZeroDivisionError

    service.faults.step = fail
    assert service.post("completions", **BODY).status_code == 500
    service.faults.step = before
    (span,) = ended()
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes["error.type"] == "500"
    with service.stream("completions", **{**BODY, "max_tokens": 200, "min_tokens": 200}) as answer:
        lines = answer.iter_lines()
        next(lines)
    (span,) = ended()  # who leaves
    assert span.attributes["gen_ai.request.model"] == "llama"
    service.client.get("/health")
    service.client.get("/metrics")
    assert service.post("completions", **{**BODY, "prompt": ["a", "cat"]}).status_code == 200
    assert [span.name for span in ended()].count("prefill") == 2


def test_metrics_are_those_of_the_requests(observed: Any) -> None:
    service, ended, reader = observed

    def read() -> dict[str, tuple[int, float, Any]]:
        found = {}
        for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.data.data_points:
                if point.attributes.get("gen_ai.request.model") == "llama" and "error.type" not in point.attributes:
                    found[metric.name] = (point.count, point.sum, point)
        return found

    assert service.post("completions", **BODY).status_code == 200
    ended()
    before, began = read(), time.perf_counter()
    assert service.post("completions", **BODY).status_code == 200
    took = time.perf_counter() - began
    ended()
    after = read()
    gained = {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in after}
    names = ("request.duration", "time_to_first_token", "time_per_output_token")
    assert set(gained) == {f"gen_ai.server.{name}" for name in names}
    assert {count for count, _ in gained.values()} == {1}
    duration, ttft, tpot = (gained[f"gen_ai.server.{name}"][1] for name in names)
    assert 2 * STEP_S <= tpot < ttft + tpot * 5 <= duration <= took
    point = after["gen_ai.server.time_to_first_token"][2]
    assert point.explicit_bounds[:3] == (0.001, 0.005, 0.01)
    assert point.attributes["gen_ai.operation.name"] == "text_completion"


def test_a_collector_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent over HTTP is OTLP, to the paths of the standard; the resource is called as its variable says."""
    got: dict[str, bytes] = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got[self.path] = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        telemetry = Telemetry.over_http(f"http://127.0.0.1:{server.server_address[1]}/")
        telemetry.traces.get_tracer("t").start_span("one").end()
        telemetry.metrics.get_meter("t").create_histogram("gen_ai.server.request.duration").record(1.0)
        telemetry.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert set(got) == {"/v1/traces", "/v1/metrics"}
    spans = ExportTraceServiceRequest.FromString(got["/v1/traces"]).resource_spans[0]
    assert spans.scope_spans[0].spans[0].name == "one"
    assert {one.key: one.value.string_value for one in spans.resource.attributes}["service.name"] == "mine"
    metrics = ExportMetricsServiceRequest.FromString(got["/v1/metrics"]).resource_metrics[0]
    assert metrics.scope_metrics[0].metrics[0].name == "gen_ai.server.request.duration"

"""What is read from a service's metrics: rates, gauges, and messages if nothing can be read."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from stageline.dashboard.figures import live
from stageline.dashboard.figures.live import Sample, Watcher
from stageline.models.errors import StagelineError

TEXT = """\
# TYPE stageline_generated_tokens counter
stageline_generated_tokens_total{{model="m"}} {tokens}
# TYPE stageline_stage_runs counter
stageline_stage_runs_total{{model="m",stage="0"}} 5.0
stageline_stage_runs_total{{model="m",stage="10"}} 5.0
stageline_stage_runs_total{{model="m",stage="2"}} 5.0
# TYPE stageline_slots gauge
stageline_slots{{model="m"}} 8.0
# TYPE stageline_ttft_seconds gauge
stageline_ttft_seconds{{model="m",quantile="0.5"}} 0.25
"""


def sample(tokens: float, at_s: float) -> Sample:
    return live.parsed(TEXT.format(tokens=tokens), at_s)


def test_rates_are_growth_over_time_and_a_restart_leaves_a_gap() -> None:
    found = [sample(10, 1.0), sample(30, 2.0), sample(5, 3.0), sample(6, 5.0)]
    assert live.rates(found, "stageline_generated_tokens_total", model="m") == [(2.0, 20.0), (5.0, 0.5)]


def test_headlines_are_of_the_last_seconds() -> None:
    now = live.latest([sample(100 * n, float(n)) for n in range(10)], "m")
    assert now.throughput_per_s == pytest.approx(100)
    assert (now.ttft_p50_s, now.slots, now.waiting) == (0.25, 8.0, None)


def test_stages_are_in_order() -> None:
    assert live.stages(sample(1, 1.0), "m") == ["0", "2", "10"]
    assert live.models(sample(1, 1.0)) == ["m"]


def test_rows_hold_the_last_minutes_only() -> None:
    rows = live.rows([("a", [(0.0, 1.0), (500.0, 2.0)])], 600.0)
    assert rows == [{"ago_s": -100.0, "value": 2.0, "line": "a"}]


@pytest.fixture
def answering() -> Iterator[tuple[str, ThreadingHTTPServer, list[str]]]:
    """A server that answers what the list's last entry says."""
    answers = [TEXT.format(tokens=1)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[-1].encode())

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", server, answers
    server.shutdown()
    server.server_close()


def test_a_service_that_goes_leaves_what_was_seen(answering: tuple[str, ThreadingHTTPServer, list[str]]) -> None:
    url, server, _ = answering
    watcher = Watcher(url)
    samples, error = watcher.look()
    assert (len(samples), error) == (1, None)
    server.shutdown()
    server.server_close()
    watcher._read()
    samples, error = watcher.look()
    assert len(samples) == 1
    assert error is not None
    assert error.startswith(f"nothing answers at {url}")


@pytest.mark.parametrize("text", ["<html>hello</html>", "up 1.0\n", "stageline_x{broken 1\n"])
def test_another_service_is_reported(text: str, answering: tuple[str, ThreadingHTTPServer, list[str]]) -> None:
    url, _, answers = answering
    answers.append(text)
    with pytest.raises(StagelineError, match=r"metrics"):
        live.scrape(url)


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc/passwd", "http://"])
def test_a_wrong_address_is_reported(url: str) -> None:
    with pytest.raises(StagelineError, match="is not an address"):
        live.scrape(url)

"""What the Live page makes of a service's metrics: rates, percentiles, panels, cards; and a watcher's messages."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from stageline.dashboard.figures import live, metrics
from stageline.dashboard.figures.live import Watcher
from stageline.dashboard.figures.metrics import Sample, parsed, scrape
from stageline.models.errors import StagelineError

TEXT = """\
# TYPE stageline_generation_tokens counter
stageline_generation_tokens_total{{model="m"}} {tokens}
# TYPE stageline_http_requests counter
stageline_http_requests_total{{route="/v1/completions",status="200"}} {tokens}
stageline_http_requests_total{{route="/v1/completions",status="401"}} {tokens}
# TYPE stageline_stage_runs counter
stageline_stage_runs_total{{model="m",stage="0"}} 5.0
stageline_stage_runs_total{{model="m",stage="10"}} 5.0
stageline_stage_runs_total{{model="m",stage="2"}} 5.0
# TYPE stageline_slots gauge
stageline_slots{{model="m"}} 8.0
# TYPE stageline_e2e_request_latency_seconds histogram
stageline_e2e_request_latency_seconds_bucket{{model="m",le="0.1"}} {tokens}
stageline_e2e_request_latency_seconds_bucket{{model="m",le="0.2"}} {tokens}
stageline_e2e_request_latency_seconds_bucket{{model="m",le="+Inf"}} {tokens}
stageline_e2e_request_latency_seconds_count{{model="m"}} {tokens}
stageline_e2e_request_latency_seconds_sum{{model="m"}} {tokens}
"""


def sample(tokens: float, at_s: float) -> Sample:
    return parsed(TEXT.format(tokens=tokens), at_s)


def test_rates_are_growth_over_time_and_a_restart_leaves_a_gap() -> None:
    found = [sample(10, 1.0), sample(30, 2.0), sample(5, 3.0), sample(6, 5.0)]
    rates = live.growth(found, lambda one: one.get("stageline_generation_tokens_total", model="m"))
    assert rates == [(2.0, 20.0), (5.0, 0.5)]


def test_cards_are_all_of_the_same_last_minute() -> None:
    now = live.latest([sample(100 * n, 10.0 * n) for n in range(10)], "m")
    assert now.over_s == 60.0
    assert now.throughput_per_s == pytest.approx(10)
    assert now.ended == 600
    assert now.errors == pytest.approx(600)  # the 401s, which the pipeline has never seen
    assert (now.slots, now.waiting, now.ttft_p50_s) == (8.0, None, None)
    assert now.latency_p50_s == pytest.approx(0.05)


def test_a_percentile_needs_enough_requests() -> None:
    assert live.latest([sample(0, 0.0), sample(99, 1.0)], "m").latency_p99_s is None
    assert live.latest([sample(0, 0.0), sample(100, 1.0)], "m").latency_p99_s == pytest.approx(0.099)


def test_stages_are_in_order() -> None:
    assert live.stages(sample(1, 1.0), "m") == ["0", "2", "10"]
    assert live.models(sample(1, 1.0)) == ["m"]


def test_any_range_has_about_as_many_points_and_they_stay_where_they_are() -> None:
    every = [sample(n, float(n)) for n in range(1000)]
    for range_s in (60.0, 300.0, 900.0):
        now, later = live.thinned(every[:900], range_s, 899.0), live.thinned(every[:901], range_s, 900.0)
        assert 60 <= len(now) <= 122
        assert now[-1].at_s == 899
        kept = {one.at_s for one in now[1:-1]}
        assert kept <= {one.at_s for one in later}


def test_rows_hold_the_ends_of_the_range_and_nothing_before_it() -> None:
    panel = live.Panel("A", "s", {"a": [(0.0, 1.0), (500.0, 2.0)]})
    rows = list(live.panel_rows([panel], 300.0, 600.0))
    assert [(row["at"], row["line"]) for row in rows] == [(300_000, None), (600_000, None), (500_000, "a")]


def test_a_panel_of_times_is_in_one_unit() -> None:
    def panel(bound: str) -> live.Panel:
        text = TEXT.replace('le="0.1"', f'le="{bound}"').replace('le="0.2"', 'le="99"')
        found = live.panels([parsed(text.format(tokens=n), float(n)) for n in (0, 50)], "m")
        return next(one for one in found if one.title == "End-to-end latency")

    assert (panel("0.1").unit, panel("0.1").lines["p50"]) == ("ms", [(50.0, pytest.approx(50))])
    assert (panel("4").unit, panel("4").lines["p50"]) == ("s", [(50.0, pytest.approx(2))])


@pytest.fixture
def answering() -> Iterator[tuple[str, ThreadingHTTPServer, list[str]]]:
    """A server that answers what the list's last entry says; a line `redirect URL` redirects, `endless PAUSE` goes on
    and on."""
    answers = [TEXT.format(tokens=1)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answers[-1].startswith("redirect "):
                self.send_response(302)
                self.send_header("Location", answers[-1].split()[1])
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            if answers[-1].startswith("endless "):
                pause_s = float(answers[-1].split()[1])
                with suppress(OSError):
                    while True:
                        self.wfile.write(b"# " + b"x" * (1 if pause_s else 2**16) + b"\n")
                        time.sleep(pause_s)
                return
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
        scrape(url)


def test_a_redirect_is_not_followed(answering: tuple[str, ThreadingHTTPServer, list[str]]) -> None:
    url, _, answers = answering
    answers.append("redirect http://169.254.169.254/latest")
    with pytest.raises(StagelineError, match="answers 302"):
        scrape(url)


@pytest.mark.parametrize("pause_s", [0, 0.05], ids=["flood", "trickle"])
def test_an_endless_answer_is_broken_off(
    pause_s: float, answering: tuple[str, ThreadingHTTPServer, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_WHOLE_S", 0.5)
    url, _, answers = answering
    answers.append(f"endless {pause_s}")
    began = time.monotonic()
    with pytest.raises(StagelineError, match="metrics"):
        scrape(url)
    assert time.monotonic() - began < 10

"""How long each page of the dashboard takes to be ready in a browser, on a large store; and the server's memory.

The store holds 2,000 synthetic runs, one of them with a million requests and one with 100,000 spans. A page is ready
when its script has run and its charts are drawn: first in a browser without a cache, then in new tabs of it. Two bare
Streamlit pages, a heading alone and a heading with one chart, show Streamlit's own share. Needs Chromium, as the
browser tests do.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from stageline.dashboard.children.command import stageline
from stageline.runtime.bench.client import DriveResult
from stageline.runtime.bench.figures import of_requests, over_repeats
from stageline.runtime.bench.records import (
    OURS,
    Environment,
    Layout,
    Load,
    Measurement,
    Requests,
    Run,
    RunSettings,
    Slo,
    StageUsage,
    Timeline,
    ladder,
)
from stageline.runtime.bench.store import Store
from stageline.runtime.options import PipelineOptions
from stageline.runtime.stages.recorder import Span

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from chromium import READY, launched, served  # as the browser tests do

RUNS, REQUESTS, SPANS, ROUNDS = 2000, 1_000_000, 100_000, 5
LOADS = (Load("SingleStream", 1), *(Load("Concurrency", n) for n in (2, 4, 8)), Load("Server", rate_per_s=20.0))


def some_requests(count: int, seed: int, repeat: int = 0) -> Requests:
    """Requests with latencies like those of a queue: most short, few long."""
    draw = np.random.default_rng(seed)
    intended = np.sort(draw.uniform(0, count / 500, count))
    first = draw.lognormal(-3, 0.3, count).astype(np.float32)
    return Requests(
        np.full(count, repeat, np.uint16),
        intended,
        np.zeros(count, np.float32),
        first,
        (first + draw.lognormal(-2.2, 0.5, count)).astype(np.float32),
        draw.integers(8, 120, count, np.uint32),
        draw.integers(2, 48, count, np.uint32),
        np.zeros(count, np.uint8),
    )


def some_run(
    seed: int, created: float, requests: int = 200, loads: tuple[Load, ...] = LOADS
) -> tuple[Run, list[Requests]]:
    """A run of the pipeline and one baseline, three repeats per load; its figures follow from its requests."""
    slo = Slo(latency_s=0.5)
    measurements, kept = [], []
    for contender in (OURS, "onnxruntime"):
        for number, load in enumerate(loads):
            repeats = [some_requests(requests // 3, seed * 31 + number * 7 + n + len(contender), n) for n in range(3)]
            seconds = [float(one.intended_s[-1] + one.latency_s[-1]) for one in repeats]
            figures = over_repeats(
                [of_requests(DriveResult(0.0, s, one), 1, slo) for s, one in zip(seconds, repeats, strict=True)]
            )
            every = Requests.join(repeats)
            ladders = {
                "latency_s": ladder(every.latency_s),
                "ttft_s": ladder(every.first_token_s),
                "tpot_s": ladder(every.tpot_s),
            }
            stages = tuple(StageUsage(n, 15, f"cpu:{n}", 900, 3.1 - n / 3, 0.02, 0.4 + n / 3) for n in range(2))
            mine = contender == OURS
            measurements.append(
                Measurement(contender, load, sum(seconds), len(every), figures, ladders, stages if mine else ())
            )
            kept.append(every)
    bundle = f"bundles/{('smollm2', 'minilm')[seed % 2]}"
    settings = RunSettings(
        loads, 3, 2.0, 1.0, seed, "synthetic requests", 1, 24, slo, ("onnxruntime",), PipelineOptions(threads=2)
    )
    environment = Environment("a synthetic machine", 2, 2**34, None, "Linux", {"stageline": "0.1.0"}, None)
    run = Run(
        uuid.uuid4().hex, "", created, bundle, f"{seed % 2:064d}", "model", "text-generation", "float32", settings,
        Layout((18, 12), ("cpu:0", "cpu:1")), environment, "done", None, created + 60.0,
        measurements=tuple(measurements),
    )  # fmt: skip
    return run, kept


def some_spans(count: int) -> Timeline:
    """Micro-batches through two stages of different length."""
    spans, free = [], [0.0, 0.0]
    for number in range(count // 2):
        at = free[0]
        for stage, took in enumerate((0.004, 0.003 + 0.0005 * (number % 3))):
            begin = max(at, free[stage])
            at = free[stage] = begin + took
            spans.append(Span(stage, "decode", number, begin, at, 8, 1, (number, number + 1)))
    return Timeline(tuple(spans))


def filled(path: Path, runs: int, requests: int, spans: int) -> tuple[Store, Run, Run]:
    """A store with `runs` runs; the newest two have `requests` requests and `spans` spans."""
    store, now = Store(path), time.time()
    templates = [some_run(seed, now)[0] for seed in range(8)]
    for number in range(runs - 2):
        created = now - 600.0 * (runs - number)
        store.put(
            replace(templates[number % 8], id=f"synthetic-{number:06d}", created=created, finished=created + 60.0)
        )
    large, kept = some_run(0, now - 120.0, requests, (Load("Server", rate_per_s=500.0),))
    store.put(large, kept[:1])
    traced, kept = some_run(0, now - 60.0, 3000, (Load("Server", rate_per_s=500.0), *LOADS))
    store.put(traced, kept[:1], [some_spans(spans)])
    return store, large, traced


def dashboard(store: Path) -> AbstractContextManager[tuple[str, int]]:
    """The dashboard as a user starts it: its address and its process id."""
    return served(stageline("dashboard", "--store", str(store)))


def bare(folder: Path, lines: Sequence[str]) -> AbstractContextManager[tuple[str, int]]:
    """A Streamlit page of just these lines: its address and its process id."""
    script = folder / "bare.py"
    script.write_text("\n".join(["import streamlit as st", "st.title('Bare')", *lines]) + "\n")
    options = ("--server.headless=true", "--browser.gatherUsageStats=false", "--server.fileWatcherType=none")
    return served([sys.executable, "-m", "streamlit", "run", str(script), *options], "--server.port")


def ready_s(context: Any, url: str) -> float:
    """Seconds from opening an address in a new tab until the page is drawn."""
    page = context.new_page()
    began = time.perf_counter()
    page.goto(url)
    page.wait_for_function(READY, timeout=60_000, polling=20)
    took = time.perf_counter() - began
    if page.query_selector('[data-testid="stException"]'):
        raise SystemExit(f"{url} shows an exception")
    page.close()
    return took


BARE = {
    "bare Streamlit, a heading": (),
    "bare Streamlit, a heading and a chart": (
        "import altair as alt, pandas as pd",
        "st.altair_chart(alt.Chart(pd.DataFrame({'x': [1, 2], 'y': [1, 2]})).mark_line().encode(x='x', y='y'))",
    ),
}


def timed(browser: Any, name: str, url: str, process_id: int) -> dict[str, float]:
    """Open a page in a new browser profile; print the time at first and later, and the server's memory."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # nothing cached
    first, *later = (ready_s(context, url) for _ in range(ROUNDS))
    context.close()
    memory, median = psutil.Process(process_id).memory_info().rss, statistics.median(later)
    print(f"{name:46}{first:7.2f} s first{median:7.2f} s later{memory / 1e6:7.0f} MB", flush=True)
    return {"first_s": first, "later_s": median, "server_bytes": memory}


PICTURES = (
    ("overview", "/", 1280, 1180, "light"),
    ("overview-dark-phone", "/", 390, 1180, "dark"),
    ("timeline", "/timeline", 1280, 900, "light"),
    ("compare", "/compare", 1280, 1120, "dark"),
    ("plan", "/plan?bundle=smollm2", 1280, 1240, "light"),
    ("run", "/run?bundle=minilm", 1280, 800, "light"),
)


def pictures(store: Path, folder: Path) -> None:
    """Pictures of the pages with the runs in `store`, for the documentation."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with dashboard(store) as (url, _), sync_playwright() as playwright:
        browser = launched(playwright)
        for name, place, width, height, theme in PICTURES:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if theme == "dark" else "light"
            )
            page = context.new_page()
            page.goto(url + place)
            page.wait_for_function(READY, timeout=60_000)
            page.wait_for_timeout(1500)  # charts fade in
            file = folder / f"{name}.png"
            page.screenshot(path=file)
            context.close()
            with Image.open(file) as image:
                image.convert("RGB").quantize(128).save(file, optimize=True)
            print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
        browser.close()


def main() -> None:
    """Fill a store, open each page several times, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--store", type=Path, help="keep the store here; with --pictures: the runs to show")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write pictures of the pages instead")
    options = parser.parse_args()
    if options.pictures:
        pictures(options.store, options.pictures)
        return
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as scratch:
        path = options.store or Path(scratch) / "bench.sqlite"
        _, large, traced = filled(path, options.runs, options.requests, SPANS)
        pages = {
            "Overview": "/",
            "Overview, run of a million requests": f"/?run={large.id}",
            "Timeline, 100,000 spans": f"/timeline?run={traced.id}",
            "Compare, a million requests": f"/compare?runs={large.id},{traced.id}",
            "Compare, a million requests with themselves": f"/compare?runs={large.id},{large.id}",
            "Run a benchmark": "/run",
            "Live": "/live",
            "Plan": "/plan",
            "Engines": "/engines",
            "Environment": "/environment",
        }
        found: dict[str, Any] = {}
        with sync_playwright() as playwright:
            browser = launched(playwright)
            for name, lines in BARE.items():
                with bare(Path(scratch), lines) as (url, process_id):
                    found[name] = timed(browser, name, url, process_id)
            with dashboard(path) as (url, process_id):
                before = psutil.Process(process_id).memory_info().rss
                for name, place in pages.items():
                    found[name] = timed(browser, name, url + place, process_id)
            browser.close()
        result = {
            "runs": options.runs, "requests": options.requests, "spans": SPANS, "rounds": ROUNDS,
            "store_bytes": path.stat().st_size, "server_bytes_at_start": before, "pages": found,
        }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

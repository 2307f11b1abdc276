"""Reports against their raw requests: every statement is computed again, with NumPy alone, from the columns."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic_runs
from stageline.models.errors import StagelineError
from stageline.runtime.bench import figures
from stageline.runtime.bench.client import DriveResult
from stageline.runtime.bench.records import (
    ANSWERED,
    OURS,
    Load,
    Measurement,
    Quality,
    Requests,
    Run,
    Slo,
    StageUsage,
    ladder,
)
from stageline.runtime.report import statements
from stageline.runtime.report.document import Chart, document
from stageline.runtime.report.formats import html, markdown, save

LOADS = (Load("Concurrency", 1), Load("Concurrency", 4), Load("Concurrency", 16))
SPEEDS = {OURS: 1.0, "onnxruntime": 2.0, "torch": 0.3}
REPEATS, TOKENS = 3, 12
SLO = Slo(latency_s=0.5)


def drive(load: Load, speed: float, seed: int) -> DriveResult:
    """120 requests of a contender that answers `load.concurrency` at a time, up to four without slowing down."""
    draw, users = np.random.default_rng(seed), load.concurrency or 1
    latency = 0.05 / speed * max(1.0, users / 4) * draw.lognormal(0, 0.1, 120)
    place = np.arange(120)
    began = np.zeros(120)
    for user in range(users):
        mine = place % users == user
        began[mine] = np.concatenate([[0.0], np.cumsum(latency[mine])[:-1]])
    requests = Requests(
        np.zeros(120, np.uint16), began, np.zeros(120, np.float32), (0.4 * latency).astype(np.float32),
        latency.astype(np.float32), np.full(120, 30, np.uint32), np.full(120, TOKENS, np.uint32),
        np.full(120, ANSWERED, np.uint8),
    )  # fmt: skip
    return DriveResult(0.0, float((began + latency).max()), requests)


def measured(contender: str, load: Load) -> tuple[Measurement, Requests]:
    """A measurement as the runner makes it of its requests, and these."""
    drives = [drive(load, SPEEDS[contender], 7 * repeat + (load.concurrency or 0)) for repeat in range(REPEATS)]
    parts = [replace(one.requests, repeat=np.full(120, n, np.uint16)) for n, one in enumerate(drives)]
    requests = Requests.join(parts)
    found = figures.over_repeats([figures.of_requests(one, 1, SLO) for one in drives])
    stages = tuple(StageUsage(n, 15, f"cpu:{n}", 90, 9.0 - 3 * n, 0.1, 0.9 + 3 * n) for n in range(2))
    ladders = {"latency_s": ladder(requests.latency_s)}
    seconds = sum(one.seconds for one in drives)
    return Measurement(contender, load, seconds, 360, found, ladders, stages if contender == OURS else ()), requests


@pytest.fixture(scope="module")
def run_and_requests() -> tuple[Run, dict[tuple[str, str], Requests]]:
    """A run of three loads and three contenders, and the requests of each."""
    pairs = [measured(contender, load) for load in LOADS for contender in SPEEDS]
    template = synthetic_runs.run(1)
    run = replace(template, measurements=tuple(one for one, _ in pairs), checkpoint="c" * 64,
                  settings=replace(template.settings, loads=LOADS, slo=SLO, repeats=REPEATS))  # fmt: skip
    return run, {(one.contender, str(one.load)): requests for one, requests in pairs}


def tokens_per_s(requests: Requests) -> list[float]:
    """Of each repeat, from the columns: tokens of answered requests, over the time to the last end."""
    found = []
    for repeat in range(REPEATS):
        mine = requests.repeat == repeat
        end = (requests.intended_s[mine] + requests.latency_s[mine]).max()
        found.append(float(requests.tokens_out[mine & (requests.status == ANSWERED)].sum() / end))
    return found


def test_the_reports_statements_are_those_of_its_raw_requests(
    run_and_requests: tuple[Run, dict[tuple[str, str], Requests]],
) -> None:
    stats = pytest.importorskip("scipy.stats")
    run, requests = run_and_requests
    text = markdown(document([run]), "report").replace("\\", "")
    said = re.findall(r"Stageline is ([\d.]+) times (\w+), (\d+ at a time) \(95 %: ([\d.]+) to ([\d.]+)\)\.", text)
    assert len(set(said)) == len(LOADS) * 2
    for value, contender, load, low, high in said:
        ours, theirs = (np.log(tokens_per_s(requests[name, load])) for name in (OURS, contender))
        wanted = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
        shown = [float(value), float(low), float(high)]
        assert shown == pytest.approx(np.exp([ours.mean() - theirs.mean(), wanted.low, wanted.high]), rel=6e-3)

    within = {load: float((requests[OURS, load].latency_s <= 0.5).mean()) for load in map(str, LOADS)}
    keeping = [load for load, share in within.items() if share >= SLO.share]
    best = max(keeping, key=lambda load: np.mean(tokens_per_s(requests[OURS, load])))
    first = re.search(
        r"^([\d,.]+) tokens/s ±\S+ % within the SLO, (.+?)\. Stageline is [\d.]+ times (\w+),", text, re.M
    )
    assert first is not None
    assert first[2] == best
    assert float(first[1].replace(",", "")) == pytest.approx(np.mean(tokens_per_s(requests[OURS, best])), rel=6e-3)
    assert first[3] == max(("onnxruntime", "torch"), key=lambda name: np.mean(tokens_per_s(requests[name, best])))
    assert "Bottleneck: stage 0, busy 90 % of the time. Next: one stage on all cores may be faster: `stageline " in text

    for load in map(str, LOADS):
        cell = re.search(rf"^### {load}.*?^\| latency p50 \| ([\d.]+) (ms|s) ", text, re.M | re.S)
        assert cell is not None
        mine = requests[OURS, load]
        medians = [np.median(mine.latency_s[mine.repeat == repeat]) for repeat in range(REPEATS)]
        shown_s = float(cell[1]) * (1e-3 if cell[2] == "ms" else 1.0)
        assert shown_s == pytest.approx(float(np.mean(medians)), rel=6e-3)


def test_at_a_given_rate_latencies_are_compared_for_all_that_keep_up_answer_it() -> None:
    run = synthetic_runs.run(1, [Load("Rate", rate_per_s=20.0)])
    ours, theirs = (one.figures["latency_p50_s"].values for one in run.measurements)
    (said,) = statements.against(run, "Rate 20/s")
    wanted = np.exp(np.mean(np.log(ours)) - np.mean(np.log(theirs)))
    assert said.ratio.value == pytest.approx(wanted)
    assert said.text.startswith(f"Stageline has {wanted:.3f} times the latency of onnxruntime, Rate 20/s (95 %: ")


def test_charts_draw_what_the_raw_requests_say(
    run_and_requests: tuple[Run, dict[tuple[str, str], Requests]],
) -> None:
    run, requests = run_and_requests
    curve = next(one.spec for one in document([run]) if isinstance(one, Chart) and one.name == "run1-latency")
    drawn = curve["data"]["values"]
    assert len(drawn) == len(LOADS) * len(SPEEDS)
    for row in drawn:
        of = requests[row["contender"], row["load"]]
        assert row["throughput"] == pytest.approx(np.mean(tokens_per_s(of)), rel=1e-3)
        medians = [np.median(of.latency_s[of.repeat == repeat]) for repeat in range(REPEATS)]
        assert row["time_s"] == pytest.approx(float(np.mean(medians)), rel=1e-3)
        assert row["least"] <= row["throughput"] <= row["most"]


def test_a_report_is_one_file_that_loads_nothing(
    run_and_requests: tuple[Run, dict[tuple[str, str], Requests]], tmp_path: Path
) -> None:
    pytest.importorskip("vl_convert")
    run = replace(run_and_requests[0], bundle="bundles/<script>alert(1)</script>")
    again = replace(run, id="again")
    other = replace(run, id="other", checkpoint="d" * 64)
    blocks = document([run, again, other])
    page = html(blocks)
    assert page.count("<svg") == sum(isinstance(one, Chart) for one in blocks) > 6
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", page.replace("xlink:href", "href"))
    assert "Not compared: they measured different models" in page
    assert "The same, margin 5 %." in page
    assert save(document([run]), tmp_path / "r.svg")
    assert sorted(file.name for file in tmp_path.iterdir())[0] == "r-run1-baselines.svg"
    (first, *drawn) = save(document([run]), tmp_path / "r.md")
    assert {f"({one.name})" for one in drawn} <= set(re.findall(r"\([\w.-]+svg\)", first.read_text()))


def test_what_cannot_be_written_is_refused(tmp_path: Path, run_and_requests: tuple[Run, object]) -> None:
    with pytest.raises(StagelineError, match=r"ends with '.pdf'; give a file that ends with .html, .md, .svg or .png"):
        save([], tmp_path / "r.pdf")
    with pytest.raises(StagelineError, match="cannot be written: No such file or directory; choose another file"):
        save([], tmp_path / "nowhere" / "r.md")


def test_the_bottleneck_is_the_most_occupied_of_stages_and_links_or_what_is_left() -> None:
    run = replace(synthetic_runs.run(1), environment=replace(synthetic_runs.run(1).environment, memory_bytes=10**9))
    template = run.measurements[0]

    def held(*stages: tuple[float, float, float], **figures: float) -> str:
        used = tuple(StageUsage(n, 15, f"cpu:{n}", 9, *times) for n, times in enumerate(stages))
        known = {name: replace(template.figures["bubble_ratio"], mean=mean) for name, mean in figures.items()}
        found = statements.bottleneck(run, replace(template, stages=used, figures=known))
        assert found is not None
        return found.what

    assert held((9.0, 0.1, 0.9), (5.0, 0.1, 4.9)) == "stage"
    assert held((3.0, 0.1, 6.9), (3.0, 6.0, 1.0)) == "link"
    assert held((3.0, 0.1, 6.9), (3.0, 0.1, 6.9), in_flight=1.0) == "load"
    assert held((3.0, 0.1, 6.9), (3.0, 0.1, 6.9), in_flight=16.0) == "host"
    assert held((9.0, 0.1, 0.9), host_memory_bytes=0.95e9) == "memory"
    assert statements.bottleneck(run, replace(template, stages=())) is None


def test_what_a_quantised_bundle_loses_stands_in_the_report(
    run_and_requests: tuple[Run, dict[tuple[str, str], Requests]],
) -> None:
    run = replace(run_and_requests[0], quality=Quality("the float32 bundle", 32, 989, 90.77, 66.91, 0.558))
    assert (
        "Quality on 32 texts, 989 tokens: perplexity 90.77, 1.36 times the reference's 66.91; the same next token as "
        "the reference at 55.8 % of places. Reference: the float32 bundle."
    ) in markdown(document([run]), "report")

"""The data of pages: names, numbers with units, changes, distributions, costs of blocks."""

import dataclasses
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from stageline.dashboard.figures import distribution
from stageline.dashboard.figures import plan as figures
from stageline.dashboard.figures import runs as results
from stageline.dashboard.settings import find_bundles
from stageline.runtime import words
from stageline.runtime.bench.records import Requests
from stageline.runtime.bench.store import Store
from stageline.runtime.options import PipelineOptions
from stageline.runtime.planning.measure import ranges
from stageline.runtime.planning.profile import Machine, MachineProfile, Point
from stageline.runtime.report import rows, statements
from stageline.runtime.workload import Workload

DASHBOARD = Path(__file__).parents[2] / "dashboard"


def test_no_file_beside_the_script_is_called_like_a_library() -> None:
    """Streamlit puts the script's folder first on sys.path."""
    known = set(packages_distributions()) | set(sys.stdlib_module_names)
    mine = {file.stem for file in DASHBOARD.iterdir() if file.suffix == ".py" or file.is_dir()}
    assert not mine & known


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (results.figure_label("latency_p99_s"), "latency p99"),
        (results.figure_label("ttft_p50_s"), "TTFT p50"),
        (results.figure_label("requests_per_s"), "requests/s"),
        (results.figure_label("host_memory_bytes"), "host memory"),
    ],
)
def test_figures_have_labels(text: str, wanted: str) -> None:
    assert text == wanted


def test_bundles_are_found_once(bundles: Path) -> None:
    assert find_bundles([bundles, bundles / "llama", bundles / "nowhere"]) == [(bundles / "llama").resolve()]


def made(count: int, seed: int = 0) -> Requests:
    draw = np.random.default_rng(seed)
    latency = draw.lognormal(-3, 1, count).astype(np.float32)
    intended = draw.uniform(0, 10, count)
    zeros = np.zeros(count, np.float32)
    status = (np.arange(count) % 50 == 0).astype(np.uint8)
    return Requests(
        zeros.astype(np.uint16),
        intended,
        zeros,
        zeros,
        latency,
        zeros.astype(np.uint32),
        zeros.astype(np.uint32),
        status,
    )


def test_histograms_hold_every_answered_request() -> None:
    one, other = made(10_000), made(300, 1)
    bounds = distribution.edges([one, other])
    for requests in (one, other):
        rows = distribution.histogram("r", requests, bounds)
        assert sum(row["percent"] for row in rows) == pytest.approx(100)
        assert len(rows) == 60


def test_a_million_requests_become_few_rows_that_agree_with_them() -> None:
    requests = made(1_000_000)
    rows = distribution.over_time("r", requests)
    assert len(rows) == 160
    good = requests.status == 0
    for row in rows[:10]:
        inside = good & (np.abs(requests.intended_s - row["at_s"]) < 10 / 160)
        wanted = np.percentile(requests.latency_s[inside], 50 if row["percentile"] == "p50" else 99)
        assert row["seconds"] == pytest.approx(wanted, rel=0.02)


def test_no_requests_are_no_trouble() -> None:
    nothing = made(0)
    assert distribution.over_time("r", nothing) == []
    assert sum(row["percent"] for row in distribution.histogram("r", nothing, distribution.edges([nothing]))) == 0


def test_a_stall_is_seen_over_time() -> None:
    requests = made(20_000)
    stalled = requests.latency_s.copy()
    stalled[(requests.intended_s > 4) & (requests.intended_s < 5)] = 9.0
    rows = distribution.over_time("r", dataclasses.replace(requests, latency_s=stalled))
    hill = [row["at_s"] for row in rows if row["percentile"] == "p50" and row["seconds"] > 8]
    assert hill
    assert min(hill) > 3.8
    assert max(hill) < 5.2


def test_blocks_add_up_to_the_model(bundles: Path) -> None:
    bundle = figures.open_unverified(bundles / "llama")
    planner = figures.planner_for(bundle, "H100", 2, Workload(slots=2, capacity=32), None)
    answer = planner.cut([1, 2])
    rows = figures.block_rows(planner, answer)
    assert [row["name"] for row in rows] == ["prologue", "block 0", "block 1", "block 2", "epilogue"]
    assert [row["stage"] for row in rows] == ["stage 0", "stage 0", "stage 1", "stage 1", "stage 1"]
    assert sum(row["parameters_m"] for row in rows) * 1e6 >= bundle.parameters
    stages = figures.stage_rows(answer)
    assert max(row["compute_ms"] + row["wait_ms"] for row in stages) == pytest.approx(answer.plan.bottleneck_s * 1e3)
    assert {row["value"].split(".")[0] for row in figures.crossing_rows(bundle, answer)} >= {"hidden"}


def test_weights_count_in_the_dtype_that_was_profiled(bundles: Path) -> None:
    bundle = figures.open_unverified(bundles / "llama")
    shapes = [(batch, length, past) for batch in (1, 4) for length, past in ((16, 0), (1, 32))]
    points = [
        Point(threads=1, batch=b, length=n, past=past, first=first, end=end, seconds=1e-3 * (end - first), runs=5)
        for b, n, past in shapes
        for first, end in ranges(bundle)
    ]
    for machine, dtype in ((Machine.here(), "float32"), (Machine.here("int8"), "int8")):
        profile = MachineProfile(machine=machine, handover_s=0.0, points=tuple(points))
        planner = figures.planner_for(bundle, figures.THIS_MACHINE, 1, Workload(slots=2, capacity=32), profile)
        assert planner.dtype == dtype
        assert planner.cut([3]).plan.bottleneck_s > 0


def test_each_place_of_a_cut_is_predicted_and_the_planner_takes_the_best(bundles: Path) -> None:
    bundle = figures.open_unverified(bundles / "llama")
    planner = figures.planner_for(bundle, "L4", 2, Workload(slots=2, capacity=32), None)
    rows = figures.moved(planner, [1, 2], 0)
    assert [row["cut"] for row in rows] == [1, 2]
    for row in rows:
        assert planner.cut([row["cut"], 3 - row["cut"]]).tokens_per_s == row["tokens_per_s"]
    best = planner.best("throughput")
    assert best.tokens_per_s >= max(row["tokens_per_s"] for row in rows) * 0.999999


def test_stages_lie_under_the_roof(bundles: Path) -> None:
    bundle = figures.open_unverified(bundles / "llama")
    planner = figures.planner_for(bundle, "H100", 2, Workload(slots=2, capacity=32), None)
    line = figures.roofline(planner, planner.cut([1, 2]))
    assert all(0 < row["share"] <= 1 for row in line.stages)
    assert {row["bound"] for row in line.stages} == {"memory bandwidth"}


def test_two_cuts_at_one_place_or_crossed_are_no_plan() -> None:
    assert figures.layers_between([2, 2], 5) is None
    assert figures.layers_between([4, 1], 5) is None
    assert figures.layers_between([1, 4], 5) == [1, 3, 1]


def test_the_run_before_is_one_that_can_be_compared(filled_store: Path) -> None:
    store = Store(filled_store)
    lines = store.runs()
    assert results.earlier(lines, lines[0]) == lines[1]
    assert results.earlier(lines, lines[1]) is None
    other = dataclasses.replace(lines[1], bundle="another", checkpoint="f" * 64)
    assert results.earlier([lines[0], other], lines[0]) is None


def test_what_differs_between_runs_is_named(filled_store: Path) -> None:
    store = Store(filled_store)
    after = store.run(store.find("latest"))
    assert results.differences(after, after) == []
    settings = dataclasses.replace(after.settings, pipeline=PipelineOptions(quantise="int8"))
    environment = dataclasses.replace(after.environment, versions={**after.environment.versions, "numpy": "0.1"})
    found = results.differences(dataclasses.replace(after, settings=settings, environment=environment), after)
    assert found[0] == "quantise: int8 → None"
    assert found[1].startswith("numpy: 0.1 → ")
    assert len(found) == 2


def test_baselines_are_compared_under_the_named_load_in_one_direction(filled_store: Path) -> None:
    store = Store(filled_store)
    run = store.run(store.find("latest"))
    for load in ("1 at a time", "4 at a time"):
        drawn = rows.baseline_rows(run, load)
        assert {row["load"] for row in drawn} == {load}
        assert drawn[0]["value"] >= drawn[1]["value"]
        values = {m.contender: m.figures["tokens_per_s"].values for m in run.measurements if str(m.load) == load}
        wanted = np.exp(np.mean(np.log(values["stageline"])) - np.mean(np.log(values["onnxruntime"])))
        ratios = {row["contender"]: row["ratio"] for row in drawn}
        assert ratios == {"stageline": None, "onnxruntime": pytest.approx(wanted)}
        (said,) = statements.against(run, load)
        assert said.text.startswith(f"Stageline is {words.figure(wanted)} times onnxruntime, {load} (95 %: ")


def test_headline_cards_are_of_one_load_with_their_doubt(filled_store: Path) -> None:
    store = Store(filled_store)
    run = store.run(store.find("latest~1"))
    measurement = run.measurements[0]
    few = dataclasses.replace(measurement, requests=12)
    cards = {card.label: card for card in results.cards(run, few)}
    assert cards["Tokens/s"].value == words.figure(measurement.figures["tokens_per_s"].mean)
    assert cards["Tokens/s"].doubt.startswith("±")
    assert cards["Latency p99"].value == "-"
    assert cards["Latency p99"].about == "p99 needs 100 requests in each repeat, not 6"
    assert "In SLO/s" in cards
    assert all(str(measurement.load) in card.about for card in cards.values() if card.value != "-")


def test_cuts_of_one_model_are_one_group_and_equal_names_are_told_apart(filled_store: Path) -> None:
    line = Store(filled_store).runs()[0]
    recut = dataclasses.replace(line, bundle="/cache/cuts/llama-3-stages")
    other = dataclasses.replace(line, bundle="/elsewhere/llama", checkpoint="f" * 64)
    found = results.by_model([line, recut, other])
    assert list(found) == [f"llama ({Path(line.bundle).parent})", "llama (/elsewhere)"]
    assert [len(group) for group in found.values()] == [2, 1]
    assert list(results.by_model([recut, line])) == ["llama"]


def test_other_cuts_of_a_model_have_curves_of_their_own(filled_store: Path) -> None:
    store = Store(filled_store)
    lines = store.runs()
    recut = dataclasses.replace(lines[1], bundle="/cache/cuts/llama-3-stages")
    other = dataclasses.replace(lines[1], bundle="/elsewhere/other", checkpoint="f" * 64)
    assert results.other_cuts([lines[0], recut, other], lines[0]) == [recut]
    run = store.run(lines[0].id)
    cut = dataclasses.replace(run, plan=dataclasses.replace(run.plan, blocks=(1, 1, 1)))
    drawn = rows.curve_rows(run, "latency_p50", None, [cut])
    assert {row["contender"] for row in drawn} == {"stageline", "onnxruntime", "stageline, 3 stages"}
    assert {row["sweep"] for row in drawn} == {f"this run {name} Concurrency" for name in
                                               ("stageline", "onnxruntime", "stageline, 3 stages")}  # fmt: skip

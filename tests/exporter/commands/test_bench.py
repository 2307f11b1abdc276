"""`stageline bench`: what a run leaves in the store, what the commands print, and what they refuse in one line."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stageline.exporter.commands.cli import main
from stageline.runtime.bench.capacity import capacities
from stageline.runtime.bench.records import ANSWERED, Figure, Requests, Run
from stageline.runtime.bench.store import Store

QUICK = ("--seconds", "0.2", "--warm-up", "0.1", "--lengths", "2-8")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The one that the commands use."""
    monkeypatch.setenv("STAGELINE_STORE", str(tmp_path / "bench.sqlite"))
    return Store()


@pytest.fixture(scope="module")
def llama(word_llama_checkpoint: Path, word_llama: Path) -> tuple[Path, Path]:
    """A checkpoint that generates, and its bundle of two stages."""
    return word_llama_checkpoint, word_llama


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["bench", *map(str, arguments)]) in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


def document(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main(["bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_measured_printed_and_kept(
    tiny_bundle: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    asked = (*QUICK, "--repeats", "2", "--baseline", "onnxruntime", "--slo", "latency=60s", "--timeline", str(trace))
    assert main(["bench", str(tiny_bundle), *asked]) == 0
    printed = capsys.readouterr()
    (line,) = store.runs()
    assert line.id in printed.out
    assert "stage 1 (1 block, cpu:" in printed.out
    assert "100% done" in printed.err
    run = store.run(line.id)
    assert (run.status, run.progress.share, run.plan.blocks) == ("done", 1.0, (2, 1))
    assert run.bundle == str(tiny_bundle.resolve())
    assert {"numpy", "onnxruntime", "python"} <= set(run.environment.versions)
    loads = [(m.contender, m.load.scenario) for m in run.measurements]
    assert loads == [(c, s) for s in ("SingleStream", "Offline", "Server") for c in ("stageline", "onnxruntime")]
    for number, measurement in enumerate(run.measurements):
        requests = store.requests(run.id, number)
        assert len(requests) == measurement.requests > 0
        figures = measurement.figures
        assert len(figures["requests_per_s"].values) == 2
        assert figures["requests_per_s"].mean == pytest.approx(figures["goodput_per_s"].mean)
        assert figures["tokens_per_s"].mean > figures["requests_per_s"].mean
        assert figures["latency_p50_s"].mean <= figures["latency_p99_s"].mean <= figures["latency_max_s"].mean
        ladder = measurement.ladders["latency_s"]
        assert ladder[-1] == pytest.approx(float(requests.latency_s.max()))
        assert list(ladder) == sorted(ladder)
        if measurement.contender == "stageline":
            assert [stage.blocks for stage in measurement.stages] == [2, 1]
            assert 0 <= figures["bubble_ratio"].mean <= 1
            timeline = store.timeline(run.id, number)
            assert {span.stage for span in timeline.spans} == {0, 1}
            assert min(span.began_s for span in timeline.spans) >= 0
        else:
            assert any("not a pipeline" in note for note in measurement.notes)
    server = run.measurements[-1].load
    assert server.rate_per_s is not None
    assert server == run.measurements[-2].load
    assert json.loads(trace.read_text())["traceEvents"]


def test_generation_is_measured_beside_torch_and_by_recorded_arrivals(
    llama: tuple[Path, Path], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "arrivals").write_text("10.0\n10.1\n10.05\n")
    asked = (*QUICK, "--repeats", "1", "--new-tokens", "4", "--concurrency", "2", "--arrivals", tmp_path / "arrivals")
    peers = ("--baseline", "torch", "--baseline", "onnxruntime", "--checkpoint", llama[0])
    run = document(capsys, llama[1], *asked, *peers)
    assert [m["load"]["scenario"] for m in run["measurements"]] == ["Concurrency"] * 3 + ["Recorded"] * 3
    for number, measurement in enumerate(run["measurements"]):
        requests = store.requests(run["id"], number)
        assert set(requests.tokens_out.tolist()) == {4}
        assert (requests.first_token_s <= requests.latency_s).all()
        assert {"ttft_p99_s", "tpot_p50_s", "itl_p50_s", "tokens_out_per_s"} <= set(measurement["figures"])
        if measurement["load"]["scenario"] == "Recorded":
            assert requests.intended_s.tolist() == pytest.approx([0.0, 0.05, 0.1])


def test_the_same_run_is_not_made_twice(tiny_bundle: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (tiny_bundle, *QUICK, "--repeats", "1", "--scenario", "offline", "--run-id", "mine")
    assert main(["bench", *map(str, asked)]) == 0
    assert "run mine is in" in refusal(capsys, *asked)
    assert len(store.runs()) == 1


def test_a_sweep_is_a_run_whose_statements_follow_from_its_requests(
    tiny_bundle: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--sweep", "--slo", "latency=60s,share=99%", "--baseline", "onnxruntime", "--repeats", "2")
    assert main(["bench", str(tiny_bundle), *QUICK, *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # lines may be broken
    run = store.run(store.find("latest"))
    assert run.status == "done"
    assert run.settings.loads == ()
    for one in capacities(run.measurements, run.settings.slo):
        mine = [(n, m) for n, m in enumerate(run.measurements) if m.contender == one.contender]
        closed = {m.load.concurrency: m for _, m in mine if m.load.scenario == "Concurrency"}
        assert list(closed) == [2**n for n in range(len(closed))]
        shares = {}
        for number, measurement in mine:
            requests = store.requests(run.id, number)
            kept = (requests.status == ANSWERED) & (requests.latency_s <= 60)
            by_repeat = [kept[requests.repeat == repeat].mean() for repeat in np.unique(requests.repeat)]
            assert measurement.figures["slo_share"].values == pytest.approx(by_repeat)
            if measurement.load.rate_per_s is not None:
                shares[measurement.load.rate_per_s] = float(np.mean(by_repeat))
        assert one.best is not None
        assert one.best.rate_per_s == max(shares)
        assert all(share >= 0.99 for share in shares.values())
        assert (f"The knee of {one.contender} is at {one.knee}" in printed) == (one.knee is not None)
        assert f"The largest rate at which {one.contender} keeps the SLO" in printed
        assert f": {one.best}" in printed


def test_workloads_ask_for_what_they_say(
    llama: tuple[Path, Path], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"from": "human", "value": "a cat"}, {"from": "gpt", "value": "sat"}] * 2
    rows = [{"prompt": "a dog", "output_tokens": 3}, {"conversations": talk}]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    trace = [{"timestamp": 10 * n, "input_length": 2 + n, "output_length": 1 + n} for n in range(3)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, trace)))
    quick = ("--seconds", "0.2", "--warm-up", "0.1", "--repeats", "1")

    def requests(*asked: str | Path) -> tuple[str, Requests]:
        run = document(capsys, llama[1], *quick, *asked)
        return run["settings"]["inputs"], store.requests(run["id"], 0)

    said, found = requests("--concurrency", "1", "--workload", tmp_path / "rows")
    assert said == "2 of 2 conversations of rows"
    assert {3, 1} == set(found.tokens_out.tolist())
    assert {4, 7} == set(found.tokens_in.tolist())  # two words and two special tokens, then five words
    said, found = requests("--arrivals", tmp_path / "trace", "--time-scale", "0.001")
    assert said == "32 texts; Recorded: 3 arrivals of trace, with their lengths"
    assert found.tokens_in.tolist() == [2, 3, 4]
    assert found.tokens_out.tolist() == [1, 2, 3]
    assert found.intended_s.tolist() == pytest.approx([0.0, 0.01, 0.02])
    asked = ("--lengths", "2-3", "--new-tokens", "1-2", "--turns", "2", "--prefixes", "2x3", "--turn-delay", "0.01")
    said, found = requests("--rate", "40", "--pattern", "constant", "--max-concurrency", "2", *asked)
    assert said == (
        "2 to 3 random tokens after one of 2 prefixes of 3 tokens, 2 turns with 0.01 s between, 1 to 2 tokens drawn"
    )
    assert len(found) == 16
    assert {5, 6} >= set(np.sort(found.tokens_in)[:8].tolist())
    assert {8, 9, 10, 11} >= set(np.sort(found.tokens_in)[8:].tolist())
    assert {1, 2} == set(found.tokens_out.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["signal", "store"])
def test_a_run_that_is_cancelled_keeps_what_it_measured(tiny_bundle: Path, store: Store, by: str) -> None:
    asked = ("--seconds", "0.5", "--warm-up", "0.2", "--repeats", "50", "--lengths", "4", "--scenario", "SingleStream")
    command = [sys.executable, "-c", "import sys; from stageline.exporter.commands.cli import main; sys.exit(main())"]
    process = subprocess.Popen([*command, "bench", str(tiny_bundle), *asked, "--run-id", "long"], env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not store.runs() or store.runs()[0].progress.share < 0.06:  # the third repeat
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert store.runs()[0].progress.live["requests_per_s"] > 0
        if by == "signal":
            process.send_signal(signal.SIGINT)
        else:
            assert main(["bench", "cancel", "long"]) == 0
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    run = store.run("long")
    assert run.status == "cancelled"
    assert 1 <= len(run.measurements[0].figures["requests_per_s"].values) < 50


def test_a_contender_that_does_not_open_ends_the_run_as_failed(
    tiny_bundle: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, tiny_bundle, *QUICK, "--baseline", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in message
    (line,) = store.runs()
    assert line.status == "failed"
    assert "cannot be reached" in str(line.error)


# The commands on existing runs.


def run_of(run_id: str, created: float, speeds: tuple[float, ...], template: Run) -> Run:
    figures = {
        "requests_per_s": Figure.of("requests/s", "higher", speeds),
        "latency_p50_s": Figure.of("s", "lower", [1 / speed for speed in speeds]),
        "latency_p99_s": Figure.of("s", "lower", [9 / speed for speed in speeds]),
    }
    measurement = replace(template.measurements[0], requests=240, figures=figures)
    return replace(template, id=run_id, created=created, measurements=(measurement,))


@pytest.fixture
def three(store: Store, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a, b (20 % slower than a, surely) and c (as a, except for noise), made from a measured one."""
    assert main(["bench", str(tiny_bundle), *QUICK, "--repeats", "1", "--scenario", "Offline", "--run-id", "real"]) == 0
    template = store.run("real")
    for number, (run_id, speeds) in enumerate({"a": (100, 101, 99), "b": (80, 81, 79), "c": (80, 101, 99)}.items()):
        store.put(run_of(run_id, template.created + 1 + number, tuple(map(float, speeds)), template))
    capsys.readouterr()
    return template


def test_compare_exits_with_1_only_if_the_pipeline_is_surely_worse(
    three: Run, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare", "a", "b"]) == 1
    printed = capsys.readouterr().out
    assert "0.800 times" in printed
    assert "worse: of 3 figures of the pipeline 2 worse, 1 undecided (margin 5 %)" in printed
    assert "p99 needs 100 requests in each repeat, not 80" in " ".join(printed.split())
    assert main(["bench", "compare", "b", "a"]) == 0
    assert "better: of" in capsys.readouterr().out
    assert main(["bench", "compare", "a", "b", "--margin", "30"]) == 0
    assert "same: of" in capsys.readouterr().out
    assert main(["bench", "compare", "a", "c"]) == 0  # 7 % slower on average, but that may be noise
    assert "undecided: of" in capsys.readouterr().out
    found = document(capsys, "compare", "latest~2", "latest", "--figure", "requests_per_s")
    (change,) = found["changes"]
    assert change["ratio"]["value"] == pytest.approx((80 / 100 * 101 / 101 * 99 / 99) ** (1 / 3), rel=1e-3)
    assert change["ratio"]["low"] < 1 < change["ratio"]["high"]
    assert (found["verdict"], change["verdict"]) == ("undecided", "undecided")


def test_a_slower_baseline_is_no_regression_but_a_hint(
    three: Run, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (store.run(name).measurements[0] for name in ("a", "b"))
    for name, measurement in (("alike", ours), ("drifted", theirs)):
        peer = replace(measurement, contender="onnxruntime")
        store.put(replace(store.run("a"), id=name, measurements=(ours, peer)))
    assert main(["bench", "compare", "alike", "drifted"]) == 0
    printed = capsys.readouterr().out
    assert "same: of 3 figures of the pipeline" in printed
    assert "onnxruntime, which is no part of Stageline, is worse: was the machine as free?" in printed


def test_compare_refuses_other_models_and_loads_with_the_reason(
    three: Run, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put(replace(store.run("a"), id="other", checkpoint="0" * 64, bundle="bundles/encoder"))
    assert "cannot be compared: they measured different models, tiny-bundle" in refusal(capsys, "compare", "a", "other")
    assert main(["bench", "compare", "a", "other"]) == 1
    store.put(replace(store.run("a"), id="rows", settings=replace(three.settings, rows=4)))
    assert "different loads (texts per request: 1, and 4)" in refusal(capsys, "compare", "a", "rows")


def test_runs_of_other_cuts_are_of_one_model(tiny_bundle: Path, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "cut"))
    assert main(["recut", str(copy), "--stages", "3"]) == 0
    for bundle in (tiny_bundle, copy):
        assert main(["bench", str(bundle), *QUICK, "--repeats", "1", "--scenario", "Offline"]) == 0
    one, other = store.runs()
    assert one.checkpoint == other.checkpoint != ""
    assert one.bundle_digest != other.bundle_digest


def test_tables_fit_the_terminal_and_say_their_doubt(
    three: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (("list",), ("show", "a"), ("compare", "a", "a")):
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert main(["bench", *arguments]) == 0
        coloured = capsys.readouterr().out
        assert "\x1b[" in coloured
        plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
        assert max(map(len, plain.splitlines())) <= 80
        monkeypatch.delenv("FORCE_COLOR")
        assert main(["bench", *arguments]) == 0
        assert "\x1b[" not in capsys.readouterr().out
    assert main(["bench", "show", "a"]) == 0
    shown = capsys.readouterr().out
    assert "stageline 240 requests" in shown
    assert re.search(r"requests/s +100 ±2 %", shown)
    assert re.search(r"latency p99 +-", shown)


def test_list_and_show(three: Run, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line["id"] for line in document(capsys, "list")] == ["c", "b", "a", "real"]
    assert main(["bench", "list", "--limit", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert document(capsys, "show", "real")["settings"]["seconds"] == 0.2
    assert main(["bench", "show"]) == 0
    assert "c  tiny-bundle  done" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_run_is_exported_and_imported_whole(
    kind: str, three: Run, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"run.{kind}"
    assert main(["bench", "export", "real", "-o", str(file)]) == 0
    other = Store(tmp_path / "other.sqlite")
    assert main(["bench", "import", str(file), "--store", str(other.path)]) == 0
    assert other.run("real") == three
    before, after = store.requests("real", 0), other.requests("real", 0)
    for name in ("repeat", "intended_s", "sent_s", "first_token_s", "latency_s", "tokens_in", "tokens_out", "status"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    if kind == "json":
        assert other.timeline("real", 0) == store.timeline("real", 0)
    if kind == "csv":
        rows = list(csv.DictReader(itertools.islice(file.open(), 1, None)))
        assert [float(row["latency_s"]) for row in rows] == pytest.approx(before.latency_s.tolist())
    capsys.readouterr()
    assert "run real is in" in refusal(capsys, "import", file)


def test_a_deleted_run_is_gone(three: Run, store: Store) -> None:
    assert main(["bench", "delete", "b"]) == 0
    assert [line.id for line in store.runs()] == ["c", "a", "real"]
    assert main(["bench", "delete", "latest"]) == 0
    assert [line.id for line in store.runs()] == ["a", "real"]


def test_no_file_is_overwritten(
    three: Run, tiny_bundle: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text("precious")
    refused = f"{file} exists already; delete it, or choose another file"
    assert refused in refusal(capsys, "export", "real", "-o", file)
    assert refused in refusal(capsys, tiny_bundle, *QUICK, "--timeline", file)
    assert file.read_text() == "precious"
    assert len(store.runs()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("BUNDLE", "--scenario", "Batch"), "unknown scenario 'Batch'; known scenarios: SingleStream, Offline, Server"),
        (("BUNDLE", "--concurrency", "1,x"), "'1,x' is not a list of numbers such as"),
        (("BUNDLE", "--concurrency", "0"), "concurrency 0 is below 1"),
        (("BUNDLE", "--rate", "-1"), "rate -1 is not above 0"),
        (("BUNDLE", "--rate", "nan"), "rate nan is not above 0"),
        (("BUNDLE", "--slo", "ttft=fast"), "'ttft=fast' is not a bound; give some of ttft=200ms"),
        (("BUNDLE", "--slo", "ttft=0s"), "'ttft=0s' is not a bound"),
        (("BUNDLE", "--lengths", "8-2"), "'8-2' is not a length"),
        (("BUNDLE", "--lengths", "64"), "64 tokens are asked for, at most 16 fit"),
        (("BUNDLE", "--lengths", "4", "--texts", "x"), "give one of --texts, --lengths and --workload"),
        (
            ("BUNDLE", "--rate", "1", "--pattern", "weekly"),
            "'weekly' is not a pattern of arrivals; give one of poisson, constant",
        ),
        (("BUNDLE", "--max-concurrency", "0"), "Invalid value for '--max-concurrency'"),
        (("BUNDLE", "--sweep", "--rate", "3"), "a sweep chooses its loads; leave out other loads"),
        (("BUNDLE", "--slo", "share=99%"), "'share=99%' says which share must keep bounds, but no bound"),
        (("BUNDLE", "--slo", "latency=1s,share=100%"), "'share=100%' is not a bound"),
        (("BUNDLE", "--slo", "latency=1s,latency=2s"), "'latency=2s' is a second bound of its kind"),
        (("BUNDLE", "--workload", "nowhere.jsonl"), "workload nowhere.jsonl cannot be read"),
        (("BUNDLE", "--workload", "x", "--turns", "2"), "a workload has its own prefixes and turns"),
        (("BUNDLE", "--pattern", "ramp"), "--pattern: it changes nothing without --rate or --sweep"),
        (("BUNDLE", "--max-concurrency", "4"), "it changes nothing without --rate, --arrivals or --sweep"),
        (("BUNDLE", "--time-scale", "2"), "it changes nothing without --arrivals; leave it out"),
        (("BUNDLE", "--turn-delay", "2"), "it changes nothing without --turns or --workload"),
        (("BUNDLE", "--check"), "--check of a model that does not generate needs a reference; give --quantise"),
        (("BUNDLE", "--check-against", "nowhere"), "no bundle at nowhere"),
        (("BUNDLE", "--turns", "2"), "--turns is for bundles that generate"),
        (("BUNDLE", "--prefixes", "2x4"), "--prefixes is for bundles that generate"),
        (("BUNDLE", "--prefixes", "2by4"), "'2by4' is not prefixes; give their number and length"),
        (("BUNDLE", "--texts", "nowhere.txt"), "texts nowhere.txt cannot be read (No such file or directory)"),
        (("BUNDLE", "--arrivals", "nowhere.txt"), "arrivals nowhere.txt cannot be read"),
        (("BUNDLE", "--new-tokens", "4"), "--new-tokens is for bundles that generate"),
        (("BUNDLE", "--baseline", "vllm"), "unknown baseline 'vllm'; known: torch, torch-compile, onnxruntime"),
        (("BUNDLE", "--baseline", "torch"), "torch needs the checkpoint: give --checkpoint"),
        (("BUNDLE", "--run-id", "../x"), "run id '../x' is not made of letters"),
        (
            ("BUNDLE", "--engine", "warp"),
            "'warp' is not one of 'onnxruntime', 'onnxruntime-cuda', 'openvino', 'tensorrt'",
        ),
        (("BUNDLE", "--devices", "tpu:0"), "unknown device 'tpu:0'"),
        (("BUNDLE", "--store", "/dev/null/s"), "store /dev/null/s cannot be used"),
        (("nowhere",), "no bundle at nowhere"),
        (("show", "nothing"), "has no run nothing; see stageline bench list"),
        (("compare", "latest", "latest~1"), "has 0 runs, so there is no latest"),
        (("compare", "a", "b", "--figure", "beauty"), "unknown figure 'beauty'; known: requests_per_s"),
        (("export", "latest", "-o", "run.xls"), "has 0 runs, so there is no latest"),
        (("import", "nowhere.json"), "nowhere.json does not exist"),
        (("import", "nowhere.xls"), "ends with '.xls'; give a file that ends with .json, .csv or .parquet"),
        (("cancel", "x"), "has no run x"),
        ((), "Missing command; see stageline bench --help"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...], message: str, tiny_bundle: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    assert message in refusal(capsys, *given)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_damaged_export_is_refused(
    kind: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"run.{kind}"
    for content in (b"", b"{}", b"\xff\xfe\x00", b"# stageline-run {}\n", b'{"format": "stageline-run"'):
        file.write_bytes(content)
        assert f"{file} is not an exported run" in refusal(capsys, "import", file)
    if kind == "json":
        file.write_text('{"format": "stageline-run", "version": 9}')
        assert "version 9; this stageline reads version 1" in refusal(capsys, "import", file)
    assert store.runs() == []


def test_a_bundle_that_vanishes_while_it_is_measured_loses_nothing(
    tiny_bundle: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))

    def vanish() -> None:
        while not store.runs():
            time.sleep(0.01)
        shutil.rmtree(copy)

    thread = threading.Thread(target=vanish)
    thread.start()
    status = main(["bench", str(copy), *QUICK, "--repeats", "1", "--scenario", "Offline", "--baseline", "onnxruntime"])
    thread.join()
    (line,) = store.runs()
    assert (status, line.status) in ((0, "done"), (1, "failed"))  # as it was opened before or after
    if status:
        assert "copy" in capsys.readouterr().err.splitlines()[-1]

"""Pages without a browser: what they show, and their messages for stores, runs and bundles that cannot be read."""

import re
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stageline.dashboard.figures import plan as figures
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.recut import recut
from stageline.runtime.layers.measure import time_layers
from stageline.runtime.layers.profile import write_layers
from stageline.runtime.report import wording
from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "dashboard" / "app.py"
StartedWith = Callable[..., None]


def overview(**query: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    app.query_params.update(query)
    return app.run()


def page(name: str, **query: str) -> AppTest:
    """A page by itself, without navigation."""
    body = f"from stageline.dashboard.views import {name}\n{name}.show()\n"
    app = AppTest.from_string(body, default_timeout=60)
    app.query_params.update(query)
    return app.run()


def messages(app: AppTest) -> str:
    """The text of its boxes; there is no exception."""
    assert not app.exception
    return as_read(" ".join(str(box.value) for box in (*app.error, *app.warning, *app.info)))


def as_read(markdown: str) -> str:
    """What a reader sees of Markdown's escaped marks."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)


def words(app: AppTest) -> str:
    """All of its texts."""
    blocks: list[Any] = [*app.title, *app.subheader, *app.markdown, *app.caption, *app.code]
    return as_read(" ".join(str(block.value) for block in blocks))


HOSTILE = "`![x](http://127.0.0.1:9/x.png) :red[a] <b>$b$</b> [c](javascript:d)"


@pytest.mark.parametrize("shown", ["overview", "compare", "run"])
def test_what_a_run_brings_along_is_no_markdown(
    filled_store: Path, tmp_path: Path, started_with: StartedWith, shown: str
) -> None:
    """Runs may be imported from others, with whatever names and errors."""
    store = Store(Path(shutil.copy(filled_store, tmp_path / "bench.sqlite")))
    newest = store.run(store.find("latest"))
    hostile = replace(newest, id="hostile", bundle=f"bundles/{HOSTILE.replace('/', '')}", created=newest.created + 9,
                      checkpoint="f" * 64, status="failed", error=HOSTILE)  # fmt: skip
    store.put(hostile if shown != "run" else replace(hostile, measurements=()))
    started_with("--store", store.path)
    query = {"runs": f"{newest.id},hostile"} if shown == "compare" else {"run": "hostile"}
    app = overview(**query) if shown == "overview" else page(shown, **query)
    assert not app.exception
    blocks: list[Any] = [*app.title, *app.subheader, *app.markdown, *app.caption, *app.error, *app.warning, *app.info]
    told = [str(block.value) for block in blocks if "javascript" in str(block.value)]
    assert told
    for one in (re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", text) for text in told):  # as code they are harmless
        assert not re.search(r"(?<!\\)(!\[|\]\(|:red|<b>|\$)", one), one


def test_overview_says_first_whether_it_is_good_and_keeps_to_one_load(
    filled_store: Path, started_with: StartedWith
) -> None:
    started_with("--store", filled_store)
    app = overview()
    assert not app.exception
    first = next(str(one.value) for one in app.markdown if "llama" in str(one.value))
    assert re.search(r"\*\*llama, 2 stages: [\d,.]+ tokens/s ±.*, \d at a time\.", first)
    assert re.search(r"Stageline is [\d.]+ times onnxruntime, \d at a time \(95 %: ", first)
    assert re.search(r"Next: .*: `stageline ", first)
    names = [metric.label for metric in app.metric]
    assert names[0] == "Tokens/s"
    assert {"Latency p50", "TTFT p50", "TPOT p50"} <= set(names)
    run = Store(filled_store).run(Store(filled_store).find("latest"))
    ours = {str(m.load): m for m in run.measurements if m.contender == "stageline"}
    for load, measurement in ours.items():
        app = overview(load=load)
        shown = {metric.label: metric.value for metric in app.metric}
        assert f"At {load}: {measurement.requests} requests in 2 repeats" in words(app)
        for label, figure in (("Tokens/s", "tokens_per_s"), ("TPOT p50", "tpot_p50_s")):
            assert shown[label] == wording.value(measurement.figures[figure], unit=False)


def test_the_overviews_address_follows_its_choices(
    filled_store: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    store = Store(Path(shutil.copy(filled_store, tmp_path / "bench.sqlite")))
    newest = store.run(store.find("latest"))
    other = replace(newest, id="other-model", bundle="bundles/other", checkpoint="f" * 64, created=newest.created - 9e4)
    store.put(other)
    started_with("--store", store.path)
    app = overview()
    app.button_group(key=f"model of {newest.id}").set_value("other").run()
    assert app.query_params["run"] in ("other-model", ["other-model"])
    assert "**other, 2 stages:" in words(app)
    app = overview(run="other-model", load="1 at a time", time="tpot", percentile="p50")
    assert "At 1 at a time: " in words(app)
    assert app.button_group(key="time").value == "tpot"


def test_compare_refuses_another_model_and_says_why(
    filled_store: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    store = Store(Path(shutil.copy(filled_store, tmp_path / "bench.sqlite")))
    newest = store.run(store.find("latest"))
    store.put(replace(newest, id="other-model", bundle="bundles/other", checkpoint="f" * 64))
    started_with("--store", store.path)
    app = page("compare", runs=f"{newest.id},other-model")
    assert "Not compared: they measured different models, llama (" in messages(app)
    assert not app.success


def damaged(kind: str, filled: Path, folder: Path) -> Path:
    """A store that cannot be read, or not fully."""
    store = Path(shutil.copy(filled, folder / "bench.sqlite"))
    if kind == "newer":
        with sqlite3.connect(store) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    elif kind == "no store":
        store.write_bytes(b"not a database at all " * 100)
    elif kind == "corrupt":
        data = bytearray(store.read_bytes())
        data[4096:] = bytes(len(data) - 4096)
        store.write_bytes(data)
    elif kind == "another program's":
        store.unlink()
        with sqlite3.connect(store) as db:
            db.execute("CREATE TABLE songs (name TEXT)")
        db.close()
    return store


@pytest.mark.parametrize(
    ("kind", "words_of"),
    [
        ("newer", "install a newer stageline"),
        ("no store", "is not a store, or is damaged"),
        ("corrupt", "is damaged"),
        ("another program's", "is a database of another program"),
    ],
)
@pytest.mark.parametrize("name", ["overview", "timeline", "compare", "run"])
def test_a_store_that_cannot_be_read_is_reported(
    kind: str, words_of: str, name: str, filled_store: Path, tmp_path: Path, bundles: Path, started_with: StartedWith
) -> None:
    started_with("--store", damaged(kind, filled_store, tmp_path), "--bundles", bundles)
    assert words_of in messages(overview() if name == "overview" else page(name))


def test_a_store_that_may_only_be_read_is_shown(filled_store: Path, tmp_path: Path, started_with: StartedWith) -> None:
    store = Path(shutil.copy(filled_store, tmp_path / "bench.sqlite"))
    store.chmod(0o400)
    started_with("--store", store)
    app = overview()
    assert not app.exception
    assert app.metric


@pytest.mark.parametrize("name", ["overview", "timeline", "compare"])
def test_a_link_to_a_run_that_is_gone_is_reported(name: str, filled_store: Path, started_with: StartedWith) -> None:
    started_with("--store", filled_store)
    query = {"runs" if name == "compare" else "run": "20200101-000000-abcdef"}
    app = overview(**query) if name == "overview" else page(name, **query)
    assert "20200101-000000-abcdef" in messages(app)


def test_a_bundle_that_vanished_is_reported(bundles: Path, tmp_path: Path, started_with: StartedWith) -> None:
    copy = shutil.copytree(bundles / "llama", tmp_path / "llama")
    started_with("--bundles", tmp_path)
    app = page("plan")
    assert not app.exception
    assert "No bundle yet" not in words(app)
    (copy / "weights" / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(copy / "weights")
    (copy / "manifest.json").touch()  # the cache no longer holds
    assert "model.safetensors" in messages(app.run())
    shutil.rmtree(copy)
    assert "No bundle yet" in words(app.run())


def test_plan_says_how_to_measure_a_machine(bundles: Path, started_with: StartedWith) -> None:
    started_with("--bundles", bundles)
    app = page("plan")
    assert "stageline profile" in messages(app)
    assert next(one for one in app.metric if one.label == "Blocks").value == "3"


def test_timeline_counts_spans_of_the_chosen_run(filled_store: Path, started_with: StartedWith) -> None:
    started_with("--store", filled_store)
    run_id = Store(filled_store).find("latest~1")
    app = page("timeline", run=run_id[:12] if Store(filled_store).find("latest")[:12] != run_id[:12] else run_id)
    assert not app.exception
    assert app.query_params["run"] in (run_id, [run_id])
    assert int(next(one for one in app.metric if one.label == "Spans").value.replace(",", "")) > 0


def test_compare_names_what_differs_and_exits_with_no_exception(filled_store: Path, started_with: StartedWith) -> None:
    started_with("--store", filled_store)
    store = Store(filled_store)
    app = page("compare", runs=f"{store.find('latest~1')},{store.find('latest')}")
    assert not app.exception
    matrix, table = app.dataframe[0].value, app.dataframe[1].value
    assert {"requests/s", "latency p50", "TTFT p50"} <= set(matrix["figure"])
    assert {"1 at a time", "4 at a time"} <= set(matrix)
    assert next(iter(table)) == "verdict"
    assert set(table["verdict"]) <= {"better", "worse", "same", "undecided"}
    app = page("compare", runs=store.find("latest"))
    assert "Choose two runs" in words(app)


def test_environment_says_what_doctor_says(started_with: StartedWith) -> None:
    started_with()
    app = page("environment")
    assert not app.exception
    cells = [cell for table in app.table for column in table.value for cell in table.value[column]]
    assert not [cell for cell in cells if re.match(r"[-*+#>]", cell)]  # Markdown's bullets, heads and quotes
    assert '"engines"' in app.code[-1].value
    names = set(app.table[0].value["engine"]) if app.table else set()
    assert "onnxruntime" in names


def test_a_locked_store_is_reported(
    filled_store: Path, tmp_path: Path, started_with: StartedWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(shutil.copy(filled_store, tmp_path / "bench.sqlite"))
    monkeypatch.setattr("stageline.runtime.bench.store.BUSY_S", 0.1)
    started_with("--store", store)
    holder = sqlite3.connect(store, isolation_level=None)
    try:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("UPDATE runs SET seen = seen")
        assert "is locked by another program" in messages(overview())
        holder.execute("ROLLBACK")
    finally:
        holder.close()
    assert overview().metric


def test_a_benchmark_without_a_load_is_refused_before_it_starts(
    bundles: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    started_with("--store", tmp_path / "bench.sqlite", "--bundles", bundles)
    app = page("run")
    assert "--scenario SingleStream,Offline --concurrency 2,4,8" in app.code[0].value
    app.button_group(key="scenarios").set_value([]).run()
    app.text_input(key="concurrency").set_value("").run()
    assert "No load is chosen" in messages(app)
    assert not app.code  # nor is there a command, which would measure all scenarios
    assert app.button(key="start").disabled


def test_a_service_that_is_not_there_is_reported(started_with: StartedWith, tmp_path: Path) -> None:
    started_with("--bundles", tmp_path)
    app = page("live", url="http://127.0.0.1:9")
    assert not app.exception
    assert "othing answers at http://127.0.0.1:9" in words(app)


def test_a_read_only_dashboard_offers_nothing_that_starts_or_stops(
    bundles: Path, filled_store: Path, started_with: StartedWith
) -> None:
    started_with("--bundles", bundles, "--store", filled_store, "--read-only")
    assert [one.label for one in page("live", url="http://127.0.0.1:9").button] == []


@pytest.mark.parametrize("name", ["run", "plan"])
def test_no_other_bundle_stands_in_for_one_that_is_gone(name: str, bundles: Path, started_with: StartedWith) -> None:
    started_with("--bundles", bundles)
    app = page(name, bundle="nope")
    assert "The bundle nope is not in" in messages(app)
    assert app.selectbox(key="bundle").value is None
    assert not app.code
    assert not app.metric
    assert app.selectbox(key="bundle").set_value("llama").run().query_params["bundle"] in ("llama", ["llama"])


def test_a_benchmark_that_runs_has_a_link_and_goes_when_it_ends(
    filled_store: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    store = Store(Path(shutil.copy(filled_store, tmp_path / "bench.sqlite")))
    done = store.run(store.find("latest"))
    store.begin(replace(done, id="later", status="running", created=done.created + 1, measurements=()))
    started_with("--store", store.path)
    app = overview()
    assert "A benchmark of llama is running" in messages(app)
    store.end("later", "cancelled")
    assert "is running" not in messages(app.run())


def test_crossed_cuts_are_refused_and_the_address_holds_the_plan(bundles: Path, started_with: StartedWith) -> None:
    started_with("--bundles", bundles)
    app = page("plan", device="H100", stages="3", cuts="2,1", slots="4")
    assert "Each cut must lie after the one before" in messages(app)
    assert app.selectbox(key="device").value == "H100"
    assert app.number_input(key="slots").value == 4
    app.slider[0].set_value(1).run()
    app.slider[1].set_value(2).run()
    assert "Each cut" not in messages(app)
    assert "cuts" not in app.query_params  # those of even stages


def test_plan_is_for_this_machine_and_says_that_it_guesses(bundles: Path, started_with: StartedWith) -> None:
    started_with("--bundles", bundles)
    app = page("plan")
    assert app.selectbox(key="device").value == "this machine"
    assert "This machine is not measured yet" in messages(app)
    assert [one.label for one in app.button] == ["Profile", "Measure this cut"]
    started_with("--bundles", bundles, "--read-only")
    assert [one.label for one in page("plan").button] == []


def test_what_was_measured_with_a_cut_is_found(filled_store: Path) -> None:
    run = Store(filled_store).run(Store(filled_store).find("latest"))
    best = max(m.figures["tokens_per_s"].mean for m in run.measurements if m.contender == "stageline")
    found = figures.measured([run], run.plan.blocks)
    assert found is not None
    assert (found.run_id, found.unit) == (run.id, "tokens")
    assert found.per_s == pytest.approx(best)
    assert figures.measured([run], [9]) is None


@pytest.fixture
def own_bundle(bundles: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that may be changed."""
    return Path(shutil.copytree(bundles / "llama", tmp_path / "own" / "llama"))


def test_engines_are_timed_compared_and_told_from_those_of_another_cut(
    own_bundle: Path, started_with: StartedWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("stageline.runtime.layers.measure._RUNS", 2)
    started_with("--bundles", own_bundle.parent)
    app = page("engines")
    assert "No layers are timed yet" in words(app)
    assert app.code[0].value == f"stageline layers {own_bundle}"
    for engine in ("onnxruntime", "openvino"):
        bundle = Bundle.open(own_bundle)
        write_layers(bundle, time_layers(bundle, engine, threads=1))
    app = page("engines")
    assert re.search(r"\*\*openvino [\d.]+ takes .* for 1 row of 128 tokens\*\*, on 1 core", words(app))
    assert re.search(r"That is [\d.]+ times the time of onnxruntime [\d.]+\.", words(app))
    assert list(app.dataframe[0].value)[1:] == [app.selectbox(key="engine of 2").value,
                                                app.selectbox(key="beside of 2").value]  # fmt: skip
    assert len(app.dataframe[1].value) == 10
    app.selectbox(key="beside of 2").set_value("none").run()
    assert "times the time of" not in words(app)
    assert app.query_params["beside"] in ("none", ["none"])
    recut(own_bundle, 3)
    app = page("engines")
    assert "was timed with stages of 2 + 1 blocks; the bundle has 1 + 1 + 1 now" in messages(app)
    (broken,) = (own_bundle / "profiles" / "layers").glob("*openvino*.json")
    broken.write_text("{")
    assert "run stageline layers again" in messages(page("engines"))


def test_a_profile_and_a_benchmark_shut_each_others_doors(
    bundles: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    started_with("--store", tmp_path / "bench.sqlite", "--bundles", bundles)
    app = AppTest.from_string(
        "from stageline.dashboard.views import launching, run\n"
        "launching.turn().ask(lambda: 'llama is being profiled')\n"
        "run.show()\n",
        default_timeout=60,
    ).run()
    assert app.button(key="start").disabled
    assert "Llama is being profiled" in str(app.button(key="start").help)


def test_the_address_of_compare_holds_its_choices(filled_store: Path, started_with: StartedWith) -> None:
    started_with("--store", filled_store)
    store = Store(filled_store)
    runs = f"{store.find('latest~1')},{store.find('latest')}"
    app = page("compare", runs=runs, measurement="stageline, 4 at a time", margin="20", time="tpot_s")
    assert app.selectbox(key="measurement").value == "stageline, 4 at a time"
    assert app.number_input(key="margin").value == 20
    assert app.button_group(key="ladder").value == "tpot_s"
    app.number_input(key="margin").set_value(7.5).run()
    assert app.query_params["margin"] in ("7.5", ["7.5"])
    app.selectbox(key="measurement").set_value("stageline, 1 at a time").run()
    assert "stageline, 1 at a time" not in str(app.query_params.get("measurement", ""))  # it is the first
    for nonsense in ("nan", "1e999", "-3", "many"):
        assert 0 <= page("compare", runs=runs, margin=nonsense).number_input(key="margin").value <= 100


def test_commands_name_a_bundle_that_there_is(bundles: Path, tmp_path: Path, started_with: StartedWith) -> None:
    started_with("--bundles", bundles, "--store", tmp_path / "bench.sqlite")
    assert page("live", url="http://127.0.0.1:9").code[0].value == f"stageline serve {bundles / 'llama'}"
    assert overview().code[0].value == f"stageline bench {bundles / 'llama'}"


def test_a_sweep_with_openvino_and_a_check_is_what_the_form_shows(
    bundles: Path, tmp_path: Path, started_with: StartedWith
) -> None:
    pytest.importorskip("openvino")
    started_with("--store", tmp_path / "bench.sqlite", "--bundles", bundles)
    app = page("run")
    app.button(key="preset Sweep").click().run()
    app.selectbox(key="engine").set_value("openvino").run()
    app.toggle(key="check").set_value(True).run()
    assert "--sweep --seconds 5 --repeats 6" in app.code[0].value
    assert "--engine openvino" in app.code[0].value
    assert "--check" in app.code[0].value
    assert "Without an SLO, a sweep searches no rates" in words(app)
    assert messages(app) == ""
    app.toggle(key="sweep").set_value(False).run()
    assert "--scenario SingleStream,Offline --concurrency 2,4,8" in app.code[0].value
    app = page("run", sweep="yes", scenarios="", concurrency="", slo="latency=2s", check="yes", engine="openvino")
    assert "--sweep" in app.code[0].value
    assert "Without an SLO" not in words(app)

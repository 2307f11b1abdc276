"""What a page asks of `stageline bench`: what it shows, what it checks and what it runs are one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stageline.dashboard.children.benchmarks import Launcher
from stageline.dashboard.children.order import Order
from stageline.dashboard.children.turn import Turn
from stageline.exporter.commands.cli import main
from stageline.runtime.bench.store import Store
from stageline.runtime.bundle.folder import Bundle, read_manifest
from stageline.runtime.options import PipelineOptions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the user's that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_command_shown_measures_what_start_measures(
    bundles: Path, tmp_path: Path, ended: Callable[[Launcher], None]
) -> None:
    store, launcher = Store(tmp_path / "bench.sqlite"), Launcher(Turn())
    order = Order(bundles / "llama", 3, ("SingleStream",), "1, 2", "", 0.2, 1, 4, "latency=2s")
    recut, bench = order.commands()
    assert main(recut[1:]) == 0
    assert main([*bench[1:], "--store", str(store.path)]) == 0
    typed = store.run(store.find("latest"))
    run_id = launcher.start(store, order)
    ended(launcher)
    pressed = store.run(run_id)
    assert pressed.settings == typed.settings
    assert (pressed.name, pressed.bundle_digest, pressed.plan) == (typed.name, typed.bundle_digest, typed.plan)
    assert [m.load for m in pressed.measurements] == [m.load for m in typed.measurements]
    assert (pressed.name, len(pressed.plan.blocks)) == ("llama", 3)


def test_another_cut_is_measured_on_a_copy(bundles: Path, cache: Path) -> None:
    before = (bundles / "llama" / "manifest.json").read_bytes()
    assert Order(bundles / "llama", 2).measured == bundles / "llama"
    assert Order(bundles / "llama", tuple(read_manifest(bundles / "llama").layers)).measured == bundles / "llama"
    for stages, many in ((3, 3), ((1, 1, 1), 3), (1, 1)):
        order = Order(bundles / "llama", stages)
        for _ in range(2):  # the second finds it
            order.cut()
        assert len(Bundle.open(order.measured).manifest.stages) == many
        assert order.measured.is_relative_to(cache)
        assert [one[1] for one in order.commands()] == ["bench"]  # no more recut: it is there
    assert (bundles / "llama" / "manifest.json").read_bytes() == before


GOOD = Order(Path("b"), scenarios=("Offline",), baselines=("onnxruntime", "http://localhost:8000/v1"))


def test_a_good_order_has_no_problem() -> None:
    assert GOOD.problems() == []
    assert GOOD.seconds_in_all() == pytest.approx(3 * (6 + 3 * 5))


def test_a_sweep_chooses_its_loads_and_takes_what_its_progress_begins_with(bundles: Path) -> None:
    sweep = replace(GOOD, bundle=bundles / "llama", scenarios=(), baselines=("onnxruntime",), sweep=True, repeats=6)
    assert sweep.problems() == []
    assert sweep.arguments()[1:6] == ["--sweep", "--seconds", "5", "--repeats", "6"]
    assert sweep.seconds_in_all() == pytest.approx(2 * (6 + 18 * 5))
    assert replace(sweep, slo="latency=2s").seconds_in_all() == pytest.approx(2 * (6 + 48 * 5))


def test_engine_and_check_are_passed_on(bundles: Path) -> None:
    order = replace(GOOD, bundle=bundles / "llama", pipeline=PipelineOptions("openvino"), check=True)
    assert order.problems() == []
    assert "--engine openvino" in " ".join(order.arguments())
    assert "--check" in order.arguments()
    assert not {"--engine", "--check", "--sweep"} & set(replace(GOOD, bundle=bundles / "llama").arguments())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": 0.0}, "seconds per repeat: 0, give 0.1 to 3600"),
        ({"seconds": None}, "seconds per repeat: nothing, give 0.1 to 3600"),
        ({"repeats": 0}, "repeats: 0, give 1 to 100"),
        ({"new_tokens": 0}, "new tokens per request: 0, give 1 to 4096"),
        ({"scenarios": ()}, "no load is chosen: pick a scenario, or enter concurrencies or rates"),
        ({"concurrency": "abc"}, "concurrency 'abc' is not a list of numbers; give some like 1,4,16"),
        ({"concurrency": "2,0"}, "concurrency 0 is below 1; give whole numbers like 1,4,16"),
        ({"rates": "-1"}, "rate -1 is not above 0; give requests per second like 5,10,20"),
        ({"sweep": True}, "a sweep chooses its loads: leave scenarios, concurrencies and rates empty"),
        ({"pipeline": PipelineOptions("tensorrt", quantise="int8")}, "the engine tensorrt has the precision that"),
        ({"slo": "soon"}, "SLO: 'soon' is not a bound"),
        ({"baselines": ("torch",)}, "baseline torch needs the checkpoint, for torch"),
        (
            {"baselines": ("http://10.0.0.1:80/v1",)},
            "baseline http://10.0.0.1:80/v1: http://10.0.0.1:80 is not",
        ),
        ({"checkpoint": "org/name"}, "checkpoint org/name: there is no such file or folder"),
    ],
)
def test_what_would_be_refused_is_said_before(change: dict[str, Any], said: str) -> None:
    (problem,) = replace(GOOD, **change).problems()
    assert problem.startswith(said)

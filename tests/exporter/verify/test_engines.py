"""Verifying engines: what is lowered wrongly is found, and without a GPU one line says what is missing."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_onnxruntime
import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import FakeDriver
from fake_tensorrt import FakeTensorRT
from stageline.exporter.commands.cli import main
from stageline.exporter.export import export
from stageline.exporter.verify import engines
from stageline.exporter.verify.engines import compare, verify_emulated
from stageline.models.errors import EngineError
from stageline.runtime.bundle.recut import recut
from stageline.runtime.devices import cuda
from stageline.runtime.devices.base import on_host
from stageline.runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine
from stageline.runtime.engines.tensorrt.flavour import Flavour
from stageline.runtime.engines.tensorrt.lower import Precision
from stageline.runtime.engines.tensorrt.records import EnginesManifest
from stageline.runtime.engines.tensorrt.store import EngineStore, read_engines
from stageline.runtime.engines.tensorrt.targets import TargetGpu, gpu_here
from stageline.runtime.workload import Workload


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 1e-2), ("bf16", 6e-2)])
def test_lowered_stages_agree_as_closely_as_their_precision_allows(
    tiny_bundle: Path, precision: str, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(tiny_bundle), "--engine", "tensorrt", "--emulated", "--precision", precision, "--json"]
    assert main(arguments) == 0
    message = json.loads(capsys.readouterr().out)
    assert message["passed"]
    assert {c["stage"] for c in message["comparisons"]} == {0, 1}
    errors = [c["max_error"] for c in message["comparisons"]]
    assert max(errors) <= most
    assert precision == "fp32" or max(errors) > 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_stages_are_judged_by_their_own_weights_and_what_these_add_is_shown(
    tiny_checkpoint: Path, made_once: Callable[..., Path], precision: Precision
) -> None:
    """In float32: in a model this small, computing in bfloat16 errs as much as weights in fp8."""
    bundle = made_once("tiny-float32", lambda folder: export(tiny_checkpoint, folder, stages=2, dtype="float32"))
    done = verify_emulated(bundle, precision, layers=False, seed=1, progress=lambda step: None)
    judged = {(c.stage, c.value): c for c in done if c.shown is None}
    shown = {(c.stage, c.value): c for c in done if c.shown == "quantised"}
    assert judged.keys() == shown.keys()
    assert all(c.max_error < 1e-2 for c in judged.values())
    assert max(c.median_error for c in shown.values()) > max(c.median_error for c in judged.values()) > 0


def test_values_inside_are_shown_on_demand(tiny_bundle: Path) -> None:
    done = verify_emulated(tiny_bundle, "bf16", layers=True, seed=1, progress=lambda step: None)
    inside = [c for c in done if c.shown == "inside"]
    assert len(inside) > 20
    assert all(c.passed for c in inside)
    assert 0 < max(c.median_error for c in inside) < 0.1


def test_errors_are_those_of_tokens_and_padding_is_left_out() -> None:
    rng = np.random.default_rng(0)
    want = rng.standard_normal((4, 10, 8)).astype(np.float32)
    real = np.ones((4, 10), np.int64)
    real[1, 5:] = 0
    got = want.copy()
    got[1, 5:] = np.nan
    assert compare(0, "h", "fp16", "float32", got, want, real).max_error == 0
    got[0, 0] += 1  # one token of 35 may be off
    assert compare(0, "h", "fp16", "float32", got, want, real).passed
    got[0] += 1
    failed = compare(0, "h", "fp16", "float32", got, want, real)
    assert not failed.passed
    assert failed.median_error == 0
    assert not compare(0, "h", "fp16", "float32", np.full_like(want, np.nan), want, real).passed


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_missing(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle), "--engine", "tensorrt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs an NVIDIA GPU with a driver, and this machine has none" in line


def test_the_engine_of_the_asked_precision_is_run_and_its_gpu_given_back(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    load, driver = Workload(micro_batch=8, length=64), FakeDriver()
    fake_tensorrt.build(bundle, load)
    built = read_engines(bundle).engines
    missing = [one.plan.model_copy(update={"path": f"{one.plan.path}.bf16"}) for one in built]
    later = (
        one.model_copy(update={"precision": "bf16", "plan": plan}) for one, plan in zip(built, missing, strict=True)
    )
    EngineStore(bundle, read_engines(bundle)).write(EnginesManifest(engines=(*built, *later)))
    monkeypatch.setattr(cuda, "load", lambda: driver)
    monkeypatch.setattr(engines, "gpu_here", lambda: TargetGpu("made-up", "sm89"))
    monkeypatch.setattr(Flavour, "version", fake_tensorrt.VERSION)
    monkeypatch.setattr(Flavour, "load", lambda self: FakeTensorRT(driver))
    done = engines.verify_engines(bundle, "fp32", seed=1, progress=lambda step: None)
    assert {(c.stage, c.precision, c.passed) for c in done} == {(0, "fp32", True), (1, "fp32", True)}
    with pytest.raises(EngineError, match=r"\.bf16 is missing"):  # the last built
        engines.verify_engines(bundle, None, seed=1, progress=lambda step: None)
    assert (driver.live_blocks, driver.live_handles) == (0, 0)


def test_each_engine_wants_its_own_options(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle)]) == 2
    assert "--against" in capsys.readouterr().err
    assert main(["verify", str(tiny_bundle), "--engine", "tensorrt", "--inner-values"]) == 2
    assert "--emulated" in capsys.readouterr().err


def test_onnxruntime_on_a_gpu_is_compared_stage_by_stage(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_llama, tmp_path / "bundle"))
    recut(bundle, 2)
    driver = FakeDriver()
    fake_onnxruntime.install(monkeypatch, driver)
    arguments = ["verify", str(bundle), "--engine", "onnxruntime-cuda", "--json"]
    assert main(arguments) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    assert [(c["stage"], c["value"]) for c in comparisons] == [(0, "hidden.3"), (1, "logits")]
    assert all(c["tolerance"] == 6e-2 and 0 < c["max_error"] < 6e-2 for c in comparisons)

    def wrong(self: Any, inputs: Any, outputs: Sequence[str]) -> dict[str, Any]:
        return {name: array + 1 for name, array in on_host(right(self, inputs, outputs), outputs).items()}

    right = OnnxRuntimeCudaEngine.run
    monkeypatch.setattr(OnnxRuntimeCudaEngine, "run", wrong)
    assert main(arguments) == 1


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU")
def test_without_a_gpu_onnxruntime_says_what_is_missing(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle), "--engine", "onnxruntime-cuda"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "there is no NVIDIA driver on this machine" in line

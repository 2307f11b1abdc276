"""Timed layers: those of the graph that the engine runs, whose times are shares of one whole, beside what it holds."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from fake_cuda import FakeDriver
from hypothesis import given
from hypothesis import strategies as st
from llamas import THREE_BLOCKS, TIED
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.devices import cuda
from stageline.runtime.engines.tensorrt.flavour import Flavour
from stageline.runtime.layers.engines import _runs_in
from stageline.runtime.layers.measure import time_layers
from stageline.runtime.layers.profile import (
    FAMILIES,
    FOLDER,
    Layer,
    LayerProfile,
    StageTimes,
    StepTimes,
    family,
    family_seconds,
    heaviest,
    read_layers,
    write_layers,
)
from stageline.runtime.workload import Workload

WIDE = {**TIED, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2}
"""Most of its work is products with large matrices."""


@pytest.fixture(scope="module")
def wide(export_once: Callable[..., Path]) -> Bundle:
    return Bundle.open(export_once(WIDE, 2, dtype="float32"))


@pytest.fixture(scope="module")
def timed(wide: Bundle) -> Callable[[str], LayerProfile]:
    found: dict[str, LayerProfile] = {}

    def get(engine: str) -> LayerProfile:
        pytest.importorskip(engine)
        if engine not in found:
            found[engine] = time_layers(wide, engine, threads=1)
        return found[engine]

    return get


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_layers_are_those_of_each_stage_and_their_times_shares_of_one_whole(
    engine: str, timed: Callable[[str], LayerProfile]
) -> None:
    profile = timed(engine)
    assert (profile.machine.engine, profile.blocks) == (engine, [1, 1])
    assert [(step.batch, step.length, step.past) for step in profile.steps] == [(1, 128, 0), (8, 1, 127)]
    for step in profile.steps:
        assert len(step.stages) == 2
        for stage in step.stages:
            names = [layer.name for layer in stage.layers]
            assert len(set(names)) == len(names) > 5
            kinds = [family(layer.kind) for layer in stage.layers]
            # q, k, v and o, gate, up and down; the last stage has the head as well
            assert kinds.count("matrix products") == (8 if stage is step.stages[-1] else 7)
            assert kinds.count("attention") == 1
            assert 0 < sum(layer.seconds for layer in stage.layers) < stage.seconds
        assert sum(family_seconds(step).values()) == pytest.approx(step.layer_seconds)
        assert {layer.precision for stage in step.stages for layer in stage.layers} >= {"float32"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_heaviest_layer_of_a_model_of_large_matrices_is_a_product(
    engine: str, timed: Callable[[str], LayerProfile]
) -> None:
    prompt = timed(engine).steps[0]
    (_, first), *_ = heaviest(prompt, 10)
    assert family(first.kind) == "matrix products"
    assert family_seconds(prompt)["matrix products"] == max(family_seconds(prompt).values())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_and_caches_are_counted_as_the_engine_holds_them(
    engine: str, timed: Callable[[str], LayerProfile], wide: Bundle
) -> None:
    profile = timed(engine)
    entries = wide.tensors.values()
    held = 4 * sum(math.prod(entry.shape) for entry in entries)
    table = 4 * 300 * WIDE["hidden_size"]  # the table of words is the head, too: the last stage holds it as well
    assert held + table <= profile.weights["float32"] <= 1.02 * (held + table)
    heads, size, tokens = WIDE["num_key_value_heads"], WIDE["hidden_size"] // 4, 128
    for stage in profile.stages:  # keys and values of 8 slots of 128 tokens
        assert stage.cache_bytes == 2 * 4 * 8 * heads * tokens * size


def test_quantised_weights_are_told_from_others(wide: Bundle) -> None:
    whole, quantised = time_layers(wide, threads=1), time_layers(wide, threads=1, quantise="int8")
    assert "uint8" in quantised.weights or "int8" in quantised.weights
    assert quantised.weights["float32"] < 0.5 * whole.weights["float32"]
    assert quantised.machine.quantise == "int8"


def test_an_engine_whose_layers_cannot_be_timed_is_named_with_those_that_can(wide: Bundle) -> None:
    with pytest.raises(EngineError, match=r"of onnxruntime-cuda cannot be timed.*: onnxruntime, openvino, tensorrt"):
        time_layers(wide, "onnxruntime-cuda")


kernels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 50)), max_size=30)


@given(kernels)
def test_kernels_belong_to_the_run_that_spans_them(found: list[tuple[int, int, int]]) -> None:
    """Against sums made by hand: 4 runs of 1 ms, each kernel (run, layer, us) somewhere inside."""
    events: list[dict[str, Any]] = [
        {"cat": "Session", "name": "model_run", "ts": 1000 * run + 10, "dur": 980} for run in range(4)
    ]
    events.append({"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5})
    for place, (run, layer, us) in enumerate(found):
        about = {"op_name": "MatMul", "input_type_shape": [{"int64": [1]}, {"float": [1, 2]}]}
        events.append({"cat": "Node", "name": f"{layer}_kernel_time", "ts": 1000 * run + 20 + place, "dur": us,
                       "args": about})  # fmt: skip
        events.append({"cat": "Node", "name": f"{layer}_fence_before", "ts": 1000 * run + 20, "dur": 1, "args": about})
    runs = _runs_in(events)
    assert len(runs) == 4
    for number, run in enumerate(runs):
        sums = {str(layer): sum(us for r, one, us in found if (r, one) == (number, layer)) for layer in range(3)}
        assert {name.name: round(seconds * 1e6) for name, seconds in run.items()} == {
            name: us for name, us in sums.items() if us
        }
        assert {(name.kind, name.precision) for name in run} <= {("MatMul", "float32")}


def profile_of(bundle: Bundle, engine: str = "onnxruntime") -> LayerProfile:
    layers = tuple(
        Layer(name=kind, kind=kind, precision="float32", seconds=seconds)
        for kind, seconds in (("Softmax", 1e-3), ("MatMul", 3e-3), ("Gather", 2e-3))
    )
    made = {
        "machine": {"cpu": "a CPU", "processors": 2, "engine": engine, "engine_version": "1"},
        "threads": 2,
        "stages": [{"first": 0, "end": 2, "weights": {"float32": 8}, "cache_bytes": 0}],
        "steps": [StepTimes(batch=1, length=4, past=0, runs=2, stages=(StageTimes(seconds=7e-3, layers=layers),))],
    }
    return LayerProfile.model_validate(made)


def test_layers_are_sorted_by_time_and_gathered_by_what_they_do(wide: Bundle) -> None:
    (step,) = profile_of(wide).steps
    assert [layer.kind for _, layer in heaviest(step, 2)] == ["MatMul", "Gather"]
    assert {what: s for what, s in family_seconds(step).items() if s} == {
        "matrix products": 3e-3, "lookups": 2e-3, "element by element": 1e-3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "what"),
    [("GroupQueryAttention", "attention"), ("PagedAttentionExtension", "attention"), ("FullyConnected", FAMILIES[1]),
     ("MatMulNBits", FAMILIES[1]), ("SkipSimplifiedLayerNormalization", "normalisation"), ("RMSNorm", "normalisation"),
     ("Gather", "lookups"), ("RMS", "normalisation"), ("Convert", "moves and casts"), ("RotaryEmbedding", FAMILIES[-1]),
     ("Conv", FAMILIES[1]), ("Transpose", "moves and casts"), ("Eltwise", "element by element")],
)  # fmt: skip
def test_both_engines_kinds_of_layer_have_families(kind: str, what: str) -> None:
    assert family(kind) == what


def test_profiles_are_kept_newest_first_and_a_broken_one_is_a_line(wide: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(wide.path, tmp_path / "bundle"))
    older = write_layers(bundle, profile_of(bundle))
    os.utime(older, (1, 1))
    write_layers(bundle, profile_of(bundle, "openvino"))
    found, unread = read_layers(bundle.path)
    assert [one.machine.engine for one in found] == ["openvino", "onnxruntime"]
    assert found[1] == profile_of(bundle)
    assert unread == []
    older.write_text('{"format": "stageline-layers", "version": 9}')
    found, (line,) = read_layers(bundle.path)
    assert [one.machine.engine for one in found] == ["openvino"]
    assert "version 9" in line
    assert [file.name for file in (bundle.path / FOLDER).iterdir() if file.name.startswith(".")] == []


def test_tensorrt_reports_its_layers_and_captures_no_step_meanwhile(
    export_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake GPU: whose TensorRT says that each run has two layers of 0.25 ms."""
    path = Path(shutil.copytree(export_once(THREE_BLOCKS, stages=2, seed=2), tmp_path / "bundle"))
    fake_tensorrt.build(path, Workload(micro_batch=4, length=128, slots=8, capacity=128))
    driver = FakeDriver(seed=5)
    monkeypatch.setattr(cuda, "load", lambda: driver)
    monkeypatch.setattr(Flavour, "version", fake_tensorrt.VERSION)
    monkeypatch.setattr(Flavour, "load", lambda self: fake_tensorrt.FakeTensorRTRtx(driver))
    profile = time_layers(Bundle.open(path), "tensorrt")
    assert (profile.machine.engine, profile.machine.cpu) == ("tensorrt-rtx", driver.name(0))
    for step in profile.steps:
        for stage in step.stages:
            assert [(layer.name, layer.seconds) for layer in stage.layers] == [
                (name, pytest.approx(0.25e-3)) for name in fake_tensorrt.LAYERS
            ]
    assert driver.count_of("launch") == 0
    assert (driver.live_blocks, driver.live_handles) == (0, 0)

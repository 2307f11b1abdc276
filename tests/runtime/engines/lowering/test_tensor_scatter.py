"""Cache attention lowered for TensorRT, run by ONNX Runtime, against the engine that its definition is checked with."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from attention_stage import CAPACITY, KINDS, SLOTS, Kind, attention_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines import Array, CacheSize, Engine, engine_factory
from stageline.runtime.engines.tensorrt.lower import Precision, lower

Pair = tuple[Engine, EmulatedStage]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind, Precision], Pair]:
    """Gives, for a kind, ONNX Runtime's own engine and the stage lowered for TensorRT."""

    @cache
    def pair(kind: Kind, precision: Precision) -> Pair:
        stage = attention_stage(kind, tmp_path_factory.mktemp("stage"))
        engine = engine_factory("onnxruntime")(stage, CpuDevice((0,)), CacheSize(SLOTS, CAPACITY, "float32"))
        lowered = lower(stage, precision, CAPACITY, stripped=False)
        return engine, EmulatedStage(lowered, SLOTS, CAPACITY)

    return pair


def step(
    kind: Kind, pair: Pair, rng: np.random.Generator, held: list[int], first: int, counts: list[int], padding: int
) -> float:
    """Run the same step in both and return the largest difference. Padding is NaN; `held` grows."""
    engine, lowered = pair
    length = max(counts) + padding
    inputs: dict[str, Array] = {}
    for layer in range(2):
        for name, (heads, size) in kind.shapes.items():
            array = rng.standard_normal((len(counts), heads, length, size)).astype(np.float32)
            for row, count in enumerate(counts):
                array[row, :, count:] = np.nan
            inputs[f"{name}{layer}"] = array
    # A row with nothing new says 0 for its past, whatever it holds, as the generator does.
    inputs["past_lengths"] = np.array([held[first + row] if count else 0 for row, count in enumerate(counts)])
    inputs["new_lengths"] = np.array(counts)
    want, got = engine.step(inputs, ["y0", "y1"], first), lowered.run(inputs, first)
    worst = 0.0
    for row, count in enumerate(counts):
        held[first + row] += count
        for name in ("y0", "y1"):
            worst = max(worst, float(np.abs(want[name][row, :count] - got[name][row, :count]).max(initial=0)))
    return worst


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999))
def test_any_ragged_steps_give_what_onnxruntime_gives(
    data: st.DataObject, name: str, seed: int, opened: Callable[[Kind, Precision], Pair]
) -> None:
    kind, rng = KINDS[name], np.random.default_rng(seed)
    pair = opened(kind, "fp32")
    held = [0] * SLOTS
    for _ in range(data.draw(st.integers(1, 6))):
        first = data.draw(st.integers(0, SLOTS - 1))
        last = data.draw(st.integers(first, SLOTS - 1))
        length = data.draw(st.integers(1, 7))
        room = [CAPACITY - held[slot] for slot in range(first, last + 1)]
        counts = [data.draw(st.integers(0, length)) if space >= length else 0 for space in room]
        if any(counts):
            assert step(kind, pair, rng, held, first, counts, length - max(counts)) <= 2e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-2), ("bf16", 6e-2)])
@pytest.mark.parametrize("name", ["grouped", "window", "all of them"])
def test_halves_are_close(
    name: str, precision: Precision, tolerance: float, opened: Callable[[Kind, Precision], Pair]
) -> None:
    held = [0] * SLOTS
    pair, rng = opened(KINDS[name], precision), np.random.default_rng(1)
    worst = [step(KINDS[name], pair, rng, held, 0, counts, 1) for counts in ([7, 1, 0, 6], [0, 5, 5, 1], [1, 1, 1, 1])]
    assert 0 < max(worst) <= tolerance


def test_a_row_with_nothing_new_keeps_every_bit(opened: Callable[[Kind, Precision], Pair]) -> None:
    kind = KINDS["grouped"]
    pair, rng, held = opened(kind, "bf16"), np.random.default_rng(2), [0] * SLOTS
    step(kind, pair, rng, held, 0, [6, 3, 2], 0)
    before = {name: array[1].copy() for name, array in pair[1].caches.items()}
    step(kind, pair, rng, held, 0, [2, 0, 5], 2)
    assert all(np.array_equal(array[1], before[name]) for name, array in pair[1].caches.items())

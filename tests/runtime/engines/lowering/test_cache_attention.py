"""Cache attention against its definition in NumPy, whatever the heads, windows and lengths: on CPUs by ONNX Runtime's
GroupQueryAttention, by standard operators where that is older, and by OpenVINO's PagedAttention; on a GPU, a fake one,
by ONNX Runtime's PagedAttention."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import fake_onnxruntime
import numpy as np
import pytest
from attention_stage import CAPACITY, KINDS, SLOTS, Kind, attention_stage
from fake_cuda import FakeDriver
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stageline.models.errors import EngineError
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.engines import (
    Array,
    CacheDtype,
    CacheSize,
    Device,
    Engine,
    engine_factory,
    onnxruntime,
)

Opened = Callable[..., Engine]


def opened(
    folder: Path,
    kind: Kind,
    dtype: CacheDtype | None = "float32",
    device: Device | None = None,
    name: str = "onnxruntime",
) -> Engine:
    size = None if dtype is None else CacheSize(SLOTS, CAPACITY, dtype)
    return engine_factory(name)(attention_stage(kind, folder), device or CpuDevice((0,)), size)


@dataclass(frozen=True)
class Way:
    """One way to run cache attention. `engine` gives an engine for a kind, without a cache or with one of a dtype."""

    name: str
    engine: Opened
    dtype: CacheDtype
    tolerance: float

    def kind(self, name: str) -> Kind:
        """The kind of this name. Skips what this way refuses."""
        if self.name == "openvino" and KINDS[name].softcap is not None:
            pytest.skip("refused: see test_soft_caps_are_refused_by_openvino")
        return KINDS[name]


@pytest.fixture(scope="module", params=["cpu", "older cpu", "openvino", "gpu"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    with pytest.MonkeyPatch.context() as patch:
        device, dtype, engine_name = None, "float32", "onnxruntime"
        if request.param == "older cpu":
            patch.setattr(onnxruntime, "_takes_ragged_rows", lambda: False)
        elif request.param == "gpu":
            fake_onnxruntime.install(patch, driver := FakeDriver(seed=8))
            ((device,), dtype) = open_gpus([(0, 0)], (0,), driver), "float16"
            engine_name = "onnxruntime-cuda"
        elif request.param == "openvino":
            engine_name = "openvino"

        @cache
        def engine(kind: Kind, dtype: CacheDtype | None = dtype) -> Engine:
            return opened(tmp_path_factory.mktemp("stage"), kind, dtype, device, engine_name)

        yield Way(request.param, engine, dtype, 2e-5 if dtype == "float32" else 1e-2)


def attend(kind: Kind, layer: int, query: Array, key: Array, value: Array) -> Array:
    """The definition, one row: the queries are the last tokens of query [tokens, heads, size] -> [tokens, heads, value
    size], float64. Key and value hold all tokens there are."""
    group = kind.heads // kind.kv_heads
    result = np.zeros((len(query), kind.heads, kind.value_size))
    first = len(key) - len(query)
    for place in range(len(query)):
        begin = 0 if kind.window is None else max(0, first + place + 1 - (kind.window + layer))
        seen = slice(begin, first + place + 1)
        for head in range(kind.heads):
            scores = key[seen, head // group].astype(np.float64) @ query[place, head] * kind.scale
            if kind.softcap is not None:
                scores = kind.softcap * np.tanh(scores / kind.softcap)
            against = [*scores, kind.sinks_of(layer)[head]] if kind.sinks else scores
            weights = np.exp(scores - np.max(against)) / np.exp(against - np.max(against)).sum()
            result[place, head] = weights @ value[seen, head // group]
    return result


@dataclass
class Rows:
    """What each slot holds, by the definition, and the same in an engine."""

    kind: Kind
    engine: Engine
    rng: np.random.Generator
    tolerance: float = 2e-5
    held: list[list[tuple[Array, Array]]] = field(init=False)  # of each slot and layer the keys and values

    def __post_init__(self) -> None:
        keys, values = (np.zeros((0, self.kind.kv_heads, n)) for n in (self.kind.key_size, self.kind.value_size))
        self.held = [[(keys, values)] * 2 for _ in range(SLOTS)]

    def made(self, rows: int, length: int) -> dict[str, Array]:
        kind, inputs = self.kind, {}
        spread = 2 if self.tolerance < 1e-3 else 1  # scores of half precision are only as exact as they are small
        for layer in range(2):
            for name, (heads, size) in kind.shapes.items():
                drawn = self.rng.standard_normal((rows, heads, length, size)).astype(np.float32)
                inputs[f"{name}{layer}"] = drawn * spread
        return inputs

    def length(self, slot: int) -> int:
        return len(self.held[slot][0][0])

    def step(self, first: int, counts: Sequence[int], padding: int = 0) -> None:
        """New tokens for the slots from `first` on, compared with the definition. What is padding is NaN."""
        length = max(counts) + padding
        inputs = self.made(len(counts), length)
        for row, count in enumerate(counts):
            for name in inputs:
                inputs[name][row, :, count:] = np.nan
        inputs["past_lengths"] = np.array([self.length(first + i) if n else 0 for i, n in enumerate(counts)])
        inputs["new_lengths"] = np.array(counts)
        outputs = on_host(self.engine.step(inputs, ["y0", "y1"], first), ["y0", "y1"])
        for row, count in enumerate(counts):
            for layer in range(2):
                query, key, value = (
                    inputs[f"{name}{layer}"][row, :, :count].swapaxes(0, 1).astype(np.float64) for name in "qkv"
                )
                keys, values = self.held[first + row][layer]
                self.held[first + row][layer] = np.concatenate([keys, key]), np.concatenate([values, value])
                expected = attend(self.kind, layer, query, *self.held[first + row][layer])
                got = outputs[f"y{layer}"][row, :count]
                np.testing.assert_allclose(got, expected, atol=self.tolerance, rtol=0)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.engine.copy_slot(source, target, tokens)
        self.held[target] = [(keys[:tokens], values[:tokens]) for keys, values in self.held[source]]


@pytest.mark.parametrize("name", KINDS)
def test_prompts_chunks_and_single_tokens_give_the_definition(name: str, way: Way) -> None:
    kind = way.kind(name)
    rows = Rows(kind, way.engine(kind), np.random.default_rng(1), way.tolerance)
    rows.step(0, [7, 1, 4, 6])
    rows.step(0, [1, 1, 1, 1])
    rows.step(1, [5])
    rows.step(1, [3, 8])
    for _ in range(4):
        rows.step(0, [1, 1, 1, 1])
    rows.step(0, [12])
    assert rows.length(0) == CAPACITY


@settings(max_examples=30, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999))
def test_any_ranges_lengths_and_copies_give_the_definition(data: st.DataObject, name: str, seed: int, way: Way) -> None:
    assume(way.name != "openvino" or KINDS[name].softcap is None)
    rows = Rows(KINDS[name], way.engine(KINDS[name]), np.random.default_rng(seed), way.tolerance)
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.integers(0, 4)) == 0:
            source, target = data.draw(st.permutations(range(SLOTS)))[:2]
            rows.copy(source, target, data.draw(st.integers(0, rows.length(source))))
            continue
        first = data.draw(st.integers(0, SLOTS - 1))
        last = data.draw(st.integers(first, SLOTS - 1))
        room = [CAPACITY - rows.length(slot) for slot in range(first, last + 1)]
        length = data.draw(st.integers(1, 9))
        counts = [data.draw(st.integers(0, length)) if space >= length else 0 for space in room]
        if any(counts):
            rows.step(first, counts, padding=length - max(counts))


def test_a_row_with_nothing_new_keeps_what_it_holds(way: Way) -> None:
    rows = Rows(KINDS["grouped"], way.engine(KINDS["grouped"]), np.random.default_rng(2), way.tolerance)
    rows.step(0, [6, 6, 6])
    rows.step(0, [9, 0, 4])
    rows.step(0, [1, 0, 1])
    rows.step(1, [2])


def test_outputs_belong_to_the_caller(way: Way) -> None:
    """Whatever the engine computes later."""
    kind = KINDS["grouped"]
    engine, rows = way.engine(kind), Rows(kind, way.engine(kind), np.random.default_rng(6))
    lengths = {"past_lengths": np.zeros(2, np.int64), "new_lengths": np.array([3, 3])}
    first = on_host(engine.step({**rows.made(2, 3), **lengths}, ["y0", "y1"], 0), ["y0", "y1"])
    before = {name: array.copy() for name, array in first.items()}
    on_host(engine.step({**rows.made(2, 3), **lengths}, ["y0"], 0), ["y0"])
    assert all(np.array_equal(first[name], array) for name, array in before.items())


def test_caches_go_from_engine_to_engine_with_all_they_hold(tmp_path: Path) -> None:
    kind = KINDS["odd sizes"]
    one, other = opened(tmp_path, kind), opened(tmp_path, kind)
    rows = Rows(kind, one, np.random.default_rng(4))
    rows.step(0, [6, 2, 0, 3])
    given = one.give_caches()
    buffers = dict(given)
    other.take_caches({**given, "layer7.key": np.zeros(1)})
    rows.engine = other
    rows.step(0, [1, 1, 0, 1])
    rows.copy(0, 2, 4)
    back = other.give_caches()
    assert all(back[name] is buffer for name, buffer in buffers.items())
    one.take_caches(back)
    rows.engine = one
    rows.step(0, [1, 3, 1, 1])
    with pytest.raises(EngineError, match=r"stage 0 received no cache 'layer1\.value'"):
        other.take_caches({name: buffer for name, buffer in back.items() if name != "layer1.value"})
    with pytest.raises(EngineError, match=r"cache 'layer0\.key' of float16 \[4, 2, 24, 16\]: it keeps float32 \[4, "):
        other.take_caches({name: buffer.astype("float16") for name, buffer in buffers.items()})


@pytest.mark.parametrize("name", KINDS)
def test_whole_rows_give_what_steps_from_an_empty_cache_give(name: str, way: Way) -> None:
    kind = way.kind(name)
    rows = Rows(kind, way.engine(kind, None), np.random.default_rng(3))
    counts = [5, 11, 1]
    inputs = rows.made(3, 11)
    inputs |= {"past_lengths": np.zeros(3, np.int64), "new_lengths": np.array(counts)}
    outputs = on_host(rows.engine.run(inputs, ["y0", "y1"]), ["y0", "y1"])
    stepped = on_host(way.engine(kind).step(inputs, ["y0", "y1"], 0), ["y0", "y1"])
    for row, count in enumerate(counts):
        for layer in range(2):
            got = outputs[f"y{layer}"][row, :count]
            query, key, value = (inputs[f"{n}{layer}"][row, :, :count].swapaxes(0, 1) for n in "qkv")
            np.testing.assert_allclose(got, attend(kind, layer, query, key, value), atol=way.tolerance)
            np.testing.assert_allclose(got, stepped[f"y{layer}"][row, :count], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("grouped", "onnxruntime"),
        ("narrow values", "onnxruntime"),
        ("all of them", "onnxruntime"),
        ("sinks", "openvino"),
        ("narrow values", "openvino"),
    ],
)
def test_a_half_precision_cache_is_close(name: str, engine: str, tmp_path: Path) -> None:
    rows = Rows(
        KINDS[name], opened(tmp_path, KINDS[name], "float16", name=engine), np.random.default_rng(4), tolerance=1e-2
    )
    rows.step(0, [7, 1, 4, 6])
    rows.copy(0, 3, 5)
    for _ in range(4):
        rows.step(0, [1, 1, 0, 1])


def test_an_older_onnxruntime_keeps_no_half_precision_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "_takes_ragged_rows", lambda: False)
    with pytest.raises(EngineError, match=r"^ONNX Runtime 1\.\S+ has no float16 caches on CPUs; leave cache_dtype"):
        opened(tmp_path, KINDS["grouped"], "float16")


def test_soft_caps_are_refused_by_openvino(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"^stage 0: OpenVINO's attention has no soft cap; choose --engine onnxruntime"
    ):
        opened(tmp_path, KINDS["softcap"], name="openvino")

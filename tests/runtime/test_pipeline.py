"""The pipeline on stages of a few nodes, against NumPy."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.models.errors import BundleError, EngineError, QueueFullError, RequestError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import Manifest, Stage, TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.engines import Array, Device, StageFile, engine_factory
from stageline.runtime.pipeline import Pipeline, PipelineStage

SECONDS = 5  # for what must happen; nothing takes that long


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


# A curve in two stages: h = 2x, then y = h + x². The second stage reads the model's input as well.
CURVE = Signature(
    (spec("x", "float32", "batch", 3),), (spec("h", "float32", "batch", 3), spec("y", "float32", "batch", 3))
)


class PythonStage:
    """An engine that computes one value with a function."""

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    max_rows: int | None = None
    packs: bool = False
    block_tokens: int | None = None

    def __init__(self, gives: str, compute: Callable[[Mapping[str, Array]], Array]) -> None:
        self.gives, self.compute, self.closed = gives, compute, False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        return {self.gives: self.compute(inputs)}

    def close(self) -> None:
        self.closed = True


def curve(first: Callable[[Array], Array] = lambda x: 2 * x, **options: Any) -> Pipeline:
    """The curve on engines in Python; `first` computes h from x."""
    engines = [
        PythonStage("h", lambda values: first(values["x"])),
        PythonStage("y", lambda values: values["h"] + values["x"] ** 2),
    ]
    stages = [
        PipelineStage(("x",), ("h",), lambda device: engines[0]),
        PipelineStage(("h", "x"), ("y",), lambda device: engines[1]),
    ]
    return Pipeline.of_stages(CURVE, stages, **options)


def rows(*values: float) -> dict[str, Array]:
    """One row of three equal numbers for each value."""
    return {"x": np.repeat(np.array(values, np.float32)[:, None], 3, axis=1)}


class Gate:
    """A first stage that waits until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened, self.runs = threading.Event(), threading.Event(), 0

    def __call__(self, x: Array) -> Array:
        self.runs += 1
        self.entered.set()
        assert self.opened.wait(SECONDS)
        return 2 * x


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def onnx_stage(folder: Path, number: int, text: str) -> PipelineStage:
    file = folder / f"{number}.onnx"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> stage {text}')
    file.write_bytes(model.SerializeToString())
    reads, gives = (tuple(value.name for value in values) for values in (model.graph.input, model.graph.output))
    return PipelineStage(reads, gives, partial(engine_factory("onnxruntime"), StageFile(number, file, folder)))


# A model of tokens in three stages: `hidden` is 6 ids + 1 for each token, `pooled` its sum under the mask.
TOKENS = Signature(
    (
        spec("input_ids", "int64", "batch", "length"),
        spec("attention_mask", "int64", "batch", "length"),
    ),
    (spec("hidden", "float32", "batch", "length", 2), spec("pooled", "float32", "batch", 2)),
    vocabulary=100,
    max_positions=16,
)


def token_stages(folder: Path) -> list[PipelineStage]:
    return [
        onnx_stage(
            folder,
            0,
            """(int64[batch, length] input_ids) => (float[batch, length, 2] twice)
            <int64[1] last = {-1}, int64[3] two = {1, 1, 2}>
            { numbers = Cast<to = 1>(input_ids)  column = Unsqueeze(numbers, last)  wide = Expand(column, two)
              twice = Add(wide, wide) }""",
        ),
        onnx_stage(
            folder,
            1,
            """(float[batch, length, 2] twice) => (float[batch, length, 2] hidden) <float three = {3}, float one = {1}>
            { six = Mul(twice, three)  hidden = Add(six, one) }""",
        ),
        onnx_stage(
            folder,
            2,
            """(float[batch, length, 2] hidden, int64[batch, length] attention_mask) => (float[batch, 2] pooled)
            <int64[1] last = {-1}, int64[1] tokens = {1}>
            { numbers = Cast<to = 1>(attention_mask)  column = Unsqueeze(numbers, last)  real = Mul(hidden, column)
              pooled = ReduceSum<keepdims = 0>(real, tokens) }""",
        ),
    ]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int | None], Pipeline]]:
    """Gives the model of tokens with a size of micro-batch; each is opened once."""
    stages = token_stages(tmp_path_factory.mktemp("stages"))
    opened: dict[int | None, Pipeline] = {}

    def with_micro_batch(size: int | None) -> Pipeline:
        if size not in opened:
            opened[size] = Pipeline.of_stages(TOKENS, stages, micro_batch=size)
        return opened[size]

    yield with_micro_batch
    for pipeline in opened.values():
        pipeline.close()


def test_outputs_equal_numpy_and_can_be_chosen() -> None:
    with curve() as pipeline:
        outputs = pipeline.run(rows(1, 2, 3))
        np.testing.assert_array_equal(outputs["h"][:, 0], [2, 4, 6])
        np.testing.assert_array_equal(outputs["y"][:, 0], [3, 8, 15])
        assert pipeline.run(rows(1), ["y"]).keys() == {"y"}


def test_stages_that_give_nothing_wanted_do_not_run() -> None:
    with curve() as pipeline:
        pipeline.run(rows(1), ["h"])
        assert [stage.runs for stage in pipeline.stats().stages] == [1, 0]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=12), micro_batch=st.sampled_from([None, 1, 2, 5, 30]))
def test_any_cut_gives_what_the_whole_batch_gives(
    tokens: Callable[[int | None], Pipeline], lengths: list[int], micro_batch: int | None
) -> None:
    count, longest = len(lengths), max(lengths)
    ids = np.arange(count * longest).reshape(count, longest) % 100
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    outputs = tokens(micro_batch).run({"input_ids": ids, "attention_mask": mask})
    hidden = np.repeat(6.0 * ids + 1, 2).reshape(count, longest, 2)
    np.testing.assert_array_equal(outputs["pooled"], (hidden * mask[..., None]).sum(1))
    assert outputs["hidden"].shape == hidden.shape
    np.testing.assert_array_equal(outputs["hidden"] * mask[..., None], hidden * mask[..., None])
    padding = outputs["hidden"][mask == 0]
    assert np.all((padding == 0) | (padding == hidden[mask == 0]))


def test_padding_all_rows_share_is_not_computed(tokens: Callable[[int | None], Pipeline]) -> None:
    ids = np.full((2, 8), 7)
    mask = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
    hidden = tokens(None).run({"input_ids": ids, "attention_mask": mask})["hidden"]
    np.testing.assert_array_equal(hidden[:, 3:], 0)
    np.testing.assert_array_equal(hidden[:, :3], 43)


def test_rows_padded_on_the_left_stay_whole(tokens: Callable[[int | None], Pipeline]) -> None:
    ids = np.full((2, 4), 7)
    mask = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    outputs = tokens(1).run({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(outputs["pooled"][:, 0], [86, 129])
    np.testing.assert_array_equal(outputs["hidden"], np.full((2, 4, 2), 43))


def test_a_missing_mask_means_every_token_counts(tokens: Callable[[int | None], Pipeline]) -> None:
    pooled = tokens(None).run({"input_ids": np.array([[1, 2, 3]], np.int32)}, ["pooled"])["pooled"]
    np.testing.assert_array_equal(pooled, [[39, 39]])


def test_results_come_back_to_their_own_requests_from_many_threads() -> None:
    with curve(queue=4, micro_batch=2) as pipeline, ThreadPoolExecutor(8) as threads:
        values = [float(i) for i in range(300)]
        found = threads.map(lambda value: pipeline.run(rows(value, -value, value))["y"][:, 0].tolist(), values)
        assert list(found) == [[v * v + 2 * v, v * v - 2 * v, v * v + 2 * v] for v in values]
        stats = pipeline.stats()
    assert (stats.done, stats.failed, stats.cancelled, stats.in_flight, stats.queued) == (300, 0, 0, 0, 0)
    assert [stage.runs for stage in stats.stages] == [600, 600]


def test_requests_of_one_thread_finish_in_order() -> None:
    ended: list[int] = []
    with curve() as pipeline:
        for number in range(50):
            pipeline.submit(rows(number)).add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
        pipeline.run(rows(0))
    assert ended == list(range(50))


def test_coroutines_share_a_queue_shorter_than_they_are_many() -> None:
    async def all_of_them(pipeline: Pipeline) -> list[dict[str, Array]]:
        return await asyncio.gather(*(pipeline.arun(rows(i)) for i in range(50)))

    with curve(queue=2) as pipeline:
        found = asyncio.run(all_of_them(pipeline))
    assert [float(outputs["h"][0, 0]) for outputs in found] == [2.0 * i for i in range(50)]


def test_waiting_for_a_place_does_not_block_the_event_loop(gate: Gate) -> None:
    async def three(pipeline: Pipeline) -> None:
        tasks = [asyncio.create_task(pipeline.arun(rows(i))) for i in range(3)]
        for _ in range(10):
            await asyncio.sleep(0.001)  # the loop turns while all of them wait
        tasks[2].cancel()  # waits for a place
        tasks[0].cancel()  # runs
        gate.opened.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SECONDS)
        assert isinstance(results[0], asyncio.CancelledError)
        assert not isinstance(results[1], BaseException)
        assert isinstance(results[2], asyncio.CancelledError)

    with curve(gate, queue=1) as pipeline:
        asyncio.run(three(pipeline))
        pipeline.submit(rows(1), wait=False).result(SECONDS)  # no place was lost


def test_a_full_queue_says_its_bound_and_the_way_out(gate: Gate) -> None:
    with curve(gate, queue=2) as pipeline:
        futures = [pipeline.submit(rows(i)) for i in range(2)]
        with pytest.raises(QueueFullError, match=r"full: 2 requests are not finished yet; wait for one .*wait=True"):
            pipeline.submit(rows(3), wait=False)
        with pytest.raises(QueueFullError, match=r"full after 0\.01 s: 2 requests"):
            pipeline.submit(rows(3), timeout=0.01)
        assert pipeline.stats().in_flight == 2
        gate.opened.set()
        pipeline.submit(rows(3)).result(SECONDS)
        assert all(future.done() for future in futures)


def test_a_cancelled_request_frees_its_place_and_no_stage_starts_on_it(gate: Gate) -> None:
    with curve(gate, queue=2) as pipeline:
        running = pipeline.submit(rows(1))
        assert gate.entered.wait(SECONDS)
        queued = pipeline.submit(rows(2))
        assert pipeline.stats().queued == 1
        assert queued.cancel()
        assert running.cancel()  # the second stage will not start on it
        futures = [pipeline.submit(rows(3), wait=False), pipeline.submit(rows(4), wait=False)]
        gate.opened.set()
        wait([queued, running, *futures], SECONDS)
        stats = pipeline.stats()
        assert [stage.runs for stage in stats.stages] == [3, 2]
        assert (stats.done, stats.cancelled) == (2, 2)
        with pytest.raises(CancelledError):
            queued.result()


def test_close_fails_what_is_unfinished_and_leaves_nobody_waiting(gate: Gate) -> None:
    before = set(threading.enumerate())
    pipeline = curve(gate, queue=3)
    futures = [pipeline.submit(rows(i)) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        late = threads.submit(pipeline.run, rows(9))  # waits for a place
        assert gate.entered.wait(SECONDS)
        closing = [threads.submit(pipeline.close) for _ in range(2)]
        for future in futures:
            with pytest.raises(RequestError, match="closed before this request was finished"):
                future.result(SECONDS)
        with pytest.raises(RequestError, match="the pipeline is closed"):
            late.result(SECONDS)
        gate.opened.set()
        for closed in closing:
            closed.result(SECONDS)
    pipeline.close()
    assert gate.runs == 1
    with pytest.raises(RequestError, match="the pipeline is closed"):
        pipeline.submit(rows(1))
    assert set(threading.enumerate()) <= before


def test_close_from_a_futures_callback_does_not_wait_for_itself() -> None:
    pipeline = curve()
    ended = threading.Event()

    def close(_: object) -> None:
        pipeline.close()
        ended.set()

    pipeline.submit(rows(1)).add_done_callback(close)
    assert ended.wait(SECONDS)
    pipeline.close()


def test_a_failing_micro_batch_fails_its_request_only() -> None:
    def first(x: Array) -> Array:
        if (x == 13).any():
            raise ValueError("unlucky\nsecond line")
        return 2 * x

    with curve(first, micro_batch=1) as pipeline:
        futures = [pipeline.submit(rows(i, i + 1)) for i in (1, 12, 3)]
        with pytest.raises(EngineError, match=r"^micro-batch 2 of 2: stage 0 failed: ValueError: unlucky$"):
            futures[1].result(SECONDS)
        assert futures[0].result(SECONDS)["h"][1, 0] == 4
        assert futures[2].result(SECONDS)["h"][1, 0] == 8
        assert pipeline.stats().failed == 1


def test_an_engine_that_raises_engine_error_keeps_its_words() -> None:
    def first(x: Array) -> Array:
        raise EngineError("stage 0 ran out of memory")

    with curve(first) as pipeline, pytest.raises(EngineError, match=r"^micro-batch 1 of 1: stage 0 ran out of memory$"):
        pipeline.run(rows(1))


def test_a_stage_that_does_not_open_fails_the_opening() -> None:
    def refuse(device: Device) -> PythonStage:
        raise EngineError("stage 1 did not open: no")

    opened = PythonStage("h", lambda values: values["x"])
    stages = [PipelineStage(("x",), ("h",), lambda device: opened), PipelineStage(("h", "x"), ("y",), refuse)]
    with pytest.raises(EngineError, match="stage 1 did not open: no"):
        Pipeline.of_stages(CURVE, stages)
    assert opened.closed


def test_more_micro_batches_than_the_window_pass_through() -> None:
    with curve(micro_batch=1) as pipeline:
        values = np.arange(100, dtype=np.float32)
        np.testing.assert_array_equal(pipeline.run(rows(*values))["y"][:, 0], values * values + 2 * values)


def test_a_slow_last_stage_does_not_gather_activations() -> None:
    ahead, most = 0, 0
    lock = threading.Lock()

    def count(change: int) -> None:
        nonlocal ahead, most
        with lock:
            ahead += change
            most = max(most, ahead)

    def first(values: Mapping[str, Array]) -> Array:
        count(+1)
        return values["x"]

    def last(values: Mapping[str, Array]) -> Array:
        threading.Event().wait(0.001)
        count(-1)
        return values["h"]

    stages = [
        PipelineStage(("x",), ("h",), lambda device: PythonStage("h", first)),
        PipelineStage(("h",), ("y",), lambda device: PythonStage("y", last)),
    ]
    with Pipeline.of_stages(CURVE, stages, micro_batch=1) as pipeline:
        pipeline.run(rows(*range(60)))
    assert most <= 4  # two a stage


def test_requests_that_skip_the_first_stage_pass_those_that_fill_the_window() -> None:
    stages = [
        PipelineStage(("x",), ("h",), lambda device: PythonStage("h", lambda values: values["x"])),
        PipelineStage(("x",), ("y",), lambda device: PythonStage("y", lambda values: -values["x"])),
    ]
    with Pipeline.of_stages(CURVE, stages, micro_batch=1) as pipeline:
        both = [pipeline.submit(rows(*range(20))) for _ in range(10)]
        late = [pipeline.submit(rows(*range(20)), ["y"]) for _ in range(10)]
        assert all(future.result(SECONDS)["y"][19, 0] == -19 for future in both + late)


def test_a_bundle_opens_with_its_own_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_stages(tmp_path)
    hidden, pooled = TOKENS.outputs
    twice = spec("twice", "float32", "batch", "length", 2)
    ids, mask = TOKENS.inputs
    borders = [((ids,), (twice,)), ((twice,), (hidden,)), ((hidden, mask), (pooled,))]
    stages = [
        Stage(file=f"{i}.onnx", first_block=i, last_block=i, inputs=reads, outputs=gives, weight_bytes=0, parameters=0)
        for i, (reads, gives) in enumerate(borders)
    ]
    manifest = Manifest.model_construct(
        inputs=TOKENS.inputs, outputs=TOKENS.outputs, vocabulary=100, max_positions=16, parts=(), stages=tuple(stages)
    )
    monkeypatch.setattr(Bundle, "open", lambda path: SimpleNamespace(path=path, manifest=manifest))
    with Pipeline.open(str(tmp_path), threads=1, micro_batch=1) as pipeline:
        pooled_rows = pipeline.run({"input_ids": np.array([[1, 2], [3, 4]])}, ["pooled"])["pooled"]
        np.testing.assert_array_equal(pooled_rows, [[20, 20], [44, 44]])
        assert len({stage.cores for stage in pipeline.stats().stages}) == 1
        with pytest.raises(RequestError, match="outside the vocabulary"):
            pipeline.run({"input_ids": np.array([[100]])})


def test_nothing_of_a_finished_request_stays_in_memory() -> None:
    gc.disable()  # so that only reference counts free it
    try:
        with curve() as pipeline:
            outputs = pipeline.run(rows(1, 2))
            pipeline.run(rows(1))
            kept = weakref.ref(outputs["y"])
            del outputs
            assert kept() is None
    finally:
        gc.enable()


def test_stats_measure_busy_time() -> None:
    def slow(x: Array) -> Array:
        threading.Event().wait(0.02)
        return 2 * x

    with curve(slow) as pipeline:
        pipeline.run(rows(1))
        stats = pipeline.stats()
    assert 0.02 <= stats.stages[0].busy_s <= stats.open_s
    assert stats.stages[0].utilisation == pytest.approx(stats.stages[0].busy_s / stats.open_s)
    assert stats.stages[1].busy_s < 0.02


def test_stages_that_do_not_connect_are_refused() -> None:
    stages = [PipelineStage(("z",), ("y",), lambda device: PythonStage("y", lambda values: values["z"]))]
    with pytest.raises(BundleError, match=r"no stage computes 'h' before it is read"):
        Pipeline.of_stages(CURVE, stages)

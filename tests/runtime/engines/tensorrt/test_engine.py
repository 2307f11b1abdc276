"""TensorRT on fake GPUs, through the real pipeline. What the engine computes is ONNX Runtime's, on the
graph that TensorRT would have been given; what it is bound to, when, and in which stream, is the engine's own doing."""

import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import FakeDriver
from fake_tensorrt import FakeTensorRT, FakeTensorRTRtx
from hypothesis import given
from hypothesis import strategies as st
from llamas import THREE_BLOCKS
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle, file_entry
from stageline.runtime.bundle.recut import recut
from stageline.runtime.devices import cuda
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.engines.base import CacheSize, StageFile
from stageline.runtime.engines.tensorrt.engine import TensorRTEngine, open_tensorrt, rounded_rows
from stageline.runtime.engines.tensorrt.flavour import Flavour
from stageline.runtime.engines.tensorrt.store import EngineStore, locked, read_engines
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.workload import Workload

SECONDS = 60
LOAD = Workload(micro_batch=4, length=32, slots=8, capacity=64)
PROMPTS = [[5, 8, 13], list(range(3, 40)), [7], [5, 8, 13, 21], list(range(60, 90))]
Install = Callable[[FakeDriver], FakeTensorRT]


@pytest.fixture(scope="module")
def decoder(export_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks in two stages, with engines for sm89."""
    made = export_once(THREE_BLOCKS, stages=2, seed=2)
    bundle = Path(shutil.copytree(made, tmp_path_factory.mktemp("tensorrt") / "bundle"))
    fake_tensorrt.build(bundle, LOAD)
    return bundle


@pytest.fixture(scope="module")
def wanted(decoder: Path) -> list[tuple[int, ...]]:
    """What the CPU's pipeline continues with."""
    with Pipeline.open(decoder, capacity=64) as pipeline:
        return [tokens_of(future) for future in submitted(pipeline)]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lets a driver be this machine's, with TensorRT-RTX on it."""

    def begin(driver: FakeDriver) -> FakeTensorRT:
        module = FakeTensorRTRtx(driver)
        monkeypatch.setattr(cuda, "load", lambda: driver)
        monkeypatch.setattr(Flavour, "version", fake_tensorrt.VERSION)
        monkeypatch.setattr(Flavour, "load", lambda self: module)
        return module

    return begin


def opened(bundle: Path, **options: Any) -> Pipeline:
    settings = {"slots": 4, "capacity": 64, "prefill_chunk": 16, **options}
    return Pipeline.open(bundle, engine="tensorrt", **settings)


def submitted(pipeline: Pipeline) -> "list[Future[Completion]]":
    sampling = Sampling(max_tokens=12)
    return [pipeline.submit(GenerationRequest(tuple(prompt), sampling)) for prompt in PROMPTS]


def tokens_of(future: "Future[Completion]") -> tuple[int, ...]:
    return future.result(SECONDS).choices[0].token_ids


@pytest.mark.parametrize("module", [FakeTensorRT, FakeTensorRTRtx])
def test_either_tensorrt_captures_its_steps(
    module: type[FakeTensorRT], decoder: Path, wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX: kernels compiled before they run first, and not behind the back of the graphs that hold them."""
    driver = FakeDriver(seed=5)
    monkeypatch.setattr(cuda, "load", lambda: driver)
    monkeypatch.setattr(Flavour, "version", fake_tensorrt.VERSION)
    monkeypatch.setattr(Flavour, "load", lambda self: module(driver))
    with opened(decoder) as pipeline:
        for _ in range(2):
            assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    assert driver.count_of("launch") > 40


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:1"], ["cpu", "cuda:0"], ["cuda:1", "cpu"]])
def test_tokens_are_those_of_the_cpu(
    devices: list[str], seed: int | None, decoder: Path, wanted: list[tuple[int, ...]], install: Install
) -> None:
    driver = FakeDriver(gpus=2, reach=[(1, 0)], seed=seed)
    install(driver)
    with opened(decoder, devices=devices) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    assert (driver.live_blocks, driver.live_handles, driver.ranges) == (0, 0, 0)


def test_batches_are_cut_to_what_the_engines_were_built_for(decoder: Path, install: Install) -> None:
    ids = np.random.default_rng(0).integers(0, 99, (11, 20))
    mask = (np.arange(20) < np.random.default_rng(1).integers(1, 21, 11)[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with Pipeline.open(decoder) as pipeline:
        expected = pipeline.run(inputs)["logits"][mask != 0]
    install(FakeDriver(seed=4))
    with opened(decoder) as pipeline:
        for future in [pipeline.submit(inputs) for _ in range(3)]:
            np.testing.assert_allclose(future.result(SECONDS)["logits"][mask != 0], expected, atol=1e-4)


def test_an_encoder_runs_in_two_stages(tiny_bundle: Path, tmp_path: Path, install: Install) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, Workload(micro_batch=3, length=8))
    inputs = {"input_ids": np.random.default_rng(0).integers(5, 12, (7, 9))}
    with Pipeline.open(tiny_bundle) as pipeline:
        expected = pipeline.run(inputs)["logits"]
    install(FakeDriver(gpus=2))
    with Pipeline.open(bundle, engine="tensorrt", devices=["cuda:0", "cuda:1"]) as pipeline:
        np.testing.assert_allclose(pipeline.run(inputs)["logits"], expected, atol=1e-5)


def test_a_decode_step_is_captured_once_and_replayed(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    module = install(driver)
    with opened(decoder, slots=1) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=10).result(SECONDS)
        made = module.contexts
        driver.calls.clear()
        pipeline.generate([9, 8, 7], max_tokens=50).result(SECONDS)
        assert driver.count_of("launch") >= 2 * 49  # both stages; the prompt may be a replay as well
        assert driver.count_of("begin_capture") <= 2  # of the prompt, if at all
        assert module.contexts == made


def test_in_the_steady_state_a_decode_step_allocates_nothing_and_waits_once(decoder: Path, install: Install) -> None:
    driver = FakeDriver(gpus=2, reach=[(1, 0)])
    install(driver)
    with opened(decoder, slots=1, devices=["cuda:0", "cuda:1"]) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=10).result(SECONDS)
        new = []
        for _ in range(5):  # how many buffers are held at once, which the first texts find out, depends on the threads
            driver.calls.clear()
            pipeline.generate([9, 8, 7], max_tokens=50).result(SECONDS)
            assert driver.count_of("synchronize_event") == driver.count_of("download") == 50  # the logits
            assert driver.count_of("synchronize", "free", "free_host") == 0
            assert driver.count_of("copy_peer") == 50 * 1
            assert driver.count_of("upload") == 50 * 2  # one for each stage, whatever it takes
            new.append(driver.count_of("allocate", "allocate_host", "new_event"))
            if new[-1] == 0:
                break
        assert new[-1] == 0, new


def test_stages_on_one_gpu_hand_on_without_a_copy(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    with opened(decoder, slots=1, devices=["cuda:0", "cuda:0"]) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=12).result(SECONDS)
        for _ in range(5):  # how many bindings are in flight depends on the threads
            driver.calls.clear()
            pipeline.generate([9, 8, 7], max_tokens=50).result(SECONDS)
            assert driver.count_of("copy", "copy_peer") == 0
            assert driver.count_of("upload") == 2 * 50
            if driver.count_of("launch") == 2 * 50:
                break
        assert driver.count_of("launch") == 2 * 50  # each stage, each step: one graph


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_eight_texts_take_one_step_a_token_whatever_the_number_of_stages(
    stages: int, export_once: Callable[..., Path], tmp_path: Path, install: Install
) -> None:
    """Stages that share a GPU share the batch, and the host waits once a step."""
    bundle = Path(shutil.copytree(export_once({**THREE_BLOCKS, "num_hidden_layers": 4}), tmp_path / "bundle"))
    recut(bundle, stages)
    fake_tensorrt.build(bundle, LOAD)
    driver, tokens = FakeDriver(), 30
    install(driver)
    with opened(bundle, slots=8, devices=["cuda:0"] * stages) as pipeline:
        driver.calls.clear()
        texts = [pipeline.generate([3 + n, 4, 5], max_tokens=tokens) for n in range(8)]
        assert all(len(text.result(SECONDS).choices[0].token_ids) == tokens for text in texts)
        amounts = [stage.amounts for stage in pipeline.stats().stages]
        assert driver.count_of("copy", "copy_peer", "synchronize") == 0
    prompts, steps = (amounts[0][kind].runs for kind in ("prefill", "decode"))
    assert prompts <= 8
    assert tokens - 1 <= steps < tokens - 1 + 8  # the last texts may begin some steps after the first
    assert all(of["decode"].runs == steps for of in amounts)
    assert driver.count_of("synchronize_event") == driver.count_of("download") == steps + prompts
    assert driver.count_of("upload") == (steps + prompts) * stages


def test_rows_that_nobody_computed_are_not_read_in_place(decoder: Path, install: Install) -> None:
    """A stage that gives 5 rows to one that runs 6: these are copied behind rows of zeros."""
    driver = FakeDriver()
    install(driver)
    devices = open_gpus([(0, 0), (1, 0)], (0,), driver)
    first, second = (open_tensorrt(stage_of(decoder, n), device, CacheSize(8, 64)) for n, device in enumerate(devices))
    given = {key: np.concatenate([value] * 5) for key, value in rows_of([9]).items()}
    values: dict[str, Any] = {**given, **first.step(given, first.output_names, 0)}
    driver.calls.clear()
    second.step(values, second.output_names, 0)
    assert driver.count_of("copy") == 0
    for name in first.output_names:
        values[name].owner.rows = 5
    second.step(values, second.output_names, 0)
    assert driver.count_of("copy") == len(set(first.output_names) & set(second.input_names))


@pytest.mark.parametrize("refuse", ["capture", "asked"])
def test_a_stage_that_cannot_be_captured_runs_all_the_same(
    refuse: str, decoder: Path, wanted: list[tuple[int, ...]], install: Install
) -> None:
    driver = FakeDriver(seed=1)
    install(driver).refuse = refuse
    with opened(decoder) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    assert driver.count_of("launch") == 0
    assert (driver.count_of("begin_capture") == 0) == (refuse == "asked")  # who says no beforehand is not tried


def test_requests_that_come_and_go_are_served_by_few_graphs(decoder: Path, install: Install) -> None:
    """A step of any number of rows is one of few sizes; odd lengths of prompts do not drive graphs out."""
    driver = FakeDriver()
    install(driver)
    (device,) = open_gpus([(0, 0)], (0,), driver)
    engine = open_tensorrt(stage_of(decoder, 0), device, CacheSize(8, 64))
    name = engine.output_names[0]
    rng = np.random.default_rng(3)
    for count in range(300):
        rows, length = (int(rng.integers(1, 9)), 1) if count % 3 else (1, int(rng.integers(2, 33)))
        inputs = {
            "input_ids": rng.integers(0, 99, (rows, length)),
            "past_lengths": np.full(rows, 7),
            "new_lengths": np.full(rows, length),
            "logits_at": np.zeros((rows, 0), np.int64),
        }
        engine.step(inputs, [name], 0)[name].read().wait()  # type: ignore[union-attr]
    assert driver.count_of("begin_capture") <= 20
    assert driver.count_of("launch") >= 180  # of 200 steps of a token
    engine.close()


def test_rows_that_a_step_adds_leave_the_caches_as_they_are(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    devices = open_gpus([(0, 0), (0, 0)], (0,), driver)
    engine, alone = (open_tensorrt(stage_of(decoder, 0), device, CacheSize(8, 64)) for device in devices)
    name = engine.output_names[0]
    for slot in range(8):
        for one in (engine, alone):
            one.step(rows_of([slot, slot + 1]), [name], slot)
    five = {key: np.concatenate([value] * 5) for key, value in rows_of([9]).items()} | {"past_lengths": np.full(5, 2)}
    found = engine.step(five, [name], 1)[name].read().wait()  # type: ignore[union-attr]
    assert found.shape[0] == 5
    for place in range(5):
        expected = alone.step({**rows_of([9]), "past_lengths": np.array([2])}, [name], 1 + place)[name]
        np.testing.assert_allclose(found[place], expected.read().wait()[0], atol=1e-5)  # type: ignore[union-attr]
    after = {**rows_of([3]), "past_lengths": np.array([2])}
    for slot in (0, 6, 7):  # 6 was added; 0 and 7 were not in the step
        results = [one.step(after, [name], slot)[name].read().wait() for one in (engine, alone)]  # type: ignore[union-attr]
        np.testing.assert_allclose(*results, atol=1e-5)


@given(st.integers(1, 10**6))
def test_less_than_a_quarter_of_the_rows_is_added(rows: int) -> None:
    assert rows <= rounded_rows(rows) < rows * 5 / 4
    assert rounded_rows(rounded_rows(rows)) == rounded_rows(rows)


@pytest.fixture
def stored(decoder: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(decoder, tmp_path / "stored"))


def compiled(bundle: Path, install: Install) -> int:
    """How many kernels are compiled when the bundle is opened, generates, and is closed."""
    module = install(FakeDriver())
    with opened(bundle, slots=1) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=5).result(SECONDS)
    return len(module.compiled)


def test_kernels_are_compiled_once_and_kept_beside_the_engine(
    stored: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.build(stored, LOAD)
    assert compiled(stored, install) > 0
    kept = read_engines(stored).kernels
    assert len(kept) == 2  # of both stages, which close at the same time
    assert {one.gpu for one in kept} == {"made-up GPU 0 (sm89)"}
    assert compiled(stored, install) == 0
    assert read_engines(stored).kernels == kept
    monkeypatch.setattr(FakeDriver, "name", lambda self, ordinal: "another GPU")
    assert compiled(stored, install) > 0
    assert len(read_engines(stored).kernels) == 4


@pytest.mark.parametrize("how", ["changed", "truncated", "missing", "unlisted", "of another driver"])
def test_kernels_that_are_not_the_listed_ones_are_compiled_again(how: str, stored: Path, install: Install) -> None:
    fake_tensorrt.build(stored, LOAD)
    first = compiled(stored, install)
    manifest = read_engines(stored)
    for one in manifest.kernels:
        file = stored / one.file.path
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            other = {"changed": data[:-1] + b" ", "truncated": data[:5], "of another driver": b'["1.0", []]'}
            file.write_bytes(other.get(how, data))
    if how == "unlisted":
        EngineStore(stored, manifest).write(manifest.model_copy(update={"kernels": ()}))
    if how == "of another driver":  # listed with its digest, and refused by TensorRT-RTX
        kernels = tuple(one.model_copy(update={"file": file_entry(stored, one.file.path)}) for one in manifest.kernels)
        EngineStore(stored, manifest).write(manifest.model_copy(update={"kernels": kernels}))
    assert compiled(stored, install) == first
    assert compiled(stored, install) == 0


def test_a_bundle_that_cannot_be_written_or_is_being_built_keeps_no_kernels(
    stored: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.build(stored, LOAD)
    with locked(stored):
        assert compiled(stored, install) > 0
    monkeypatch.setattr(EngineStore, "put_kernels", lambda *given: (_ for _ in ()).throw(OSError(30, "read-only")))
    assert compiled(stored, install) > 0
    assert read_engines(stored).kernels == ()


def test_kernels_go_with_their_engine(stored: Path, install: Install) -> None:
    fake_tensorrt.build(stored, LOAD)
    compiled(stored, install)
    files = [stored / one.file.path for one in read_engines(stored).kernels]
    with locked(stored) as store:
        store.prune({read_engines(stored).engines[0].plan.path})
    assert [file.exists() for file in files].count(True) == len(read_engines(stored).kernels) == 1


def test_stripped_engines_take_the_weights_of_the_bundle(
    decoder: Path, wanted: list[tuple[int, ...]], tmp_path: Path, install: Install
) -> None:
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, LOAD, stripped=True)
    driver = FakeDriver()
    install(driver)
    with opened(bundle, devices=["cuda:0"]) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    assert driver.live_blocks == 0


def test_a_version_compatible_engine_may_bring_its_runtime_and_no_other_may(
    decoder: Path, wanted: list[tuple[int, ...]], tmp_path: Path, install: Install
) -> None:
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, LOAD, version_compatible=True)
    install(FakeDriver())
    with opened(bundle) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    path = bundle / "engines/manifest.json"
    path.write_text(path.read_text().replace('"version_compatible": true', '"version_compatible": false'))
    with pytest.raises(EngineError, match="an engine with host code is not allowed by this runtime"):
        opened(bundle)


def stage_of(bundle: Path, number: int) -> StageFile:
    stage = Bundle.open(bundle).manifest.stages[number]
    return StageFile(number, bundle / stage.file, bundle, stage.caches)


def rows_of(tokens: list[int]) -> dict[str, Any]:
    """One row that begins with these tokens."""
    ids, lengths = np.array([tokens]), {"past_lengths": np.zeros(1, np.int64), "new_lengths": np.array([len(tokens)])}
    return {"input_ids": ids, **lengths, "logits_at": np.zeros((1, 0), np.int64)}


def test_results_that_are_held_are_not_overwritten(decoder: Path, install: Install) -> None:
    """A lane that is ahead of the next one: every result has a binding of its own until it is dropped."""
    driver = FakeDriver()
    module = install(driver)
    (device,) = open_gpus([(0, 0)], (0,), driver)
    engine = open_tensorrt(stage_of(decoder, 0), device, CacheSize(4, 64))
    outputs = engine.output_names[:1]

    def step(token: int) -> Any:
        return engine.step(rows_of([token]), outputs, 0)[outputs[0]]

    held = [step(token) for token in range(6)]
    alone = [step(token).read().wait() for token in range(6)]
    for value, expected in zip(held, alone, strict=True):
        np.testing.assert_array_equal(value.read().wait(), expected)
    made = module.contexts
    assert made == 7
    del held, value
    for token in range(20):
        step(token)
    assert module.contexts == made
    engine.close()
    engine.close()


def test_results_outlive_the_engine_and_its_graphs_do_not(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    (device,) = open_gpus([(0, 0)], (0,), driver)
    engine = open_tensorrt(stage_of(decoder, 0), device, CacheSize(4, 64))
    name = engine.output_names[0]
    for token in range(6):
        held = engine.step(rows_of([token]), [name], 0)[name]
    expected = held.read().wait()  # type: ignore[union-attr]
    bindings = engine._bindings._all
    assert len(driver._graphs) == len(bindings) == 2  # one of them is leased to what is held
    contexts = [weakref.ref(binding.context) for binding in bindings]
    del bindings
    engine.close()
    assert not driver._graphs
    assert [context() for context in contexts] == [None, None]
    np.testing.assert_array_equal(held.read().wait(), expected)  # type: ignore[union-attr]


def test_a_refusal_does_not_quote_the_error_of_an_earlier_one(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    module = install(driver)
    (device,) = open_gpus([(0, 0)], (0,), driver)
    engine = open_tensorrt(stage_of(decoder, 0), device, CacheSize(4, 64))
    module.refuse = "run"
    with pytest.raises(EngineError, match="cask failed"):
        engine.step(rows_of([1]), engine.output_names, 0)
    module.refuse = "silently"
    with pytest.raises(EngineError, match=r"^stage 0 failed in TensorRT on cuda:0$"):
        engine.step(rows_of([1]), engine.output_names, 0)
    engine.close()


def test_weights_are_replaced_while_the_engine_is_open(decoder: Path, tmp_path: Path, install: Install) -> None:
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, LOAD, stripped=True)
    driver = FakeDriver()
    install(driver)
    (device,) = open_gpus([(0, 0)], (0,), driver)
    engine = open_tensorrt(stage_of(bundle, 0), device, CacheSize(4, 64))
    name = engine.output_names[0]
    inputs = rows_of([1, 2, 3])
    before = engine.step(inputs, [name], 0)[name].read().wait()  # type: ignore[union-attr]
    specs = engine._record.weights
    engine.load_weights((spec.name, np.zeros([int(size) for size in spec.shape], spec.dtype)) for spec in specs)
    after = engine.step(inputs, [name], 0)[name].read().wait()  # type: ignore[union-attr]
    assert np.abs(before).max() > 0
    assert np.abs(after).max() == 0


def test_what_tensorrt_says_is_reported(decoder: Path, install: Install) -> None:
    module = install(FakeDriver())
    module.refuse = "plan"
    with pytest.raises(EngineError, match=r"^stage \d does not open in TensorRT on cuda:0: .*the plan is not mine$"):
        opened(decoder)
    module.refuse = ""
    with opened(decoder) as pipeline:
        module.refuse = "run"
        with pytest.raises(EngineError, match=r"^stage 0 failed in TensorRT on cuda:0: .* Error Code 1: cask failed$"):
            pipeline.generate([1, 2], max_tokens=2).result(SECONDS)
        module.refuse = ""
        assert len(pipeline.generate([1, 2], max_tokens=2).result(SECONDS).choices[0].token_ids) == 2


def test_what_the_engines_were_not_built_for_is_reported(decoder: Path, install: Install) -> None:
    install(FakeDriver())
    for options, message in (
        ({"capacity": 100}, "stage 0 was built for 64 tokens a slot, 100 are requested; open with capacity=64, or"),
        ({"slots": 9}, "stage 0 was built for 8 slots, 9 are requested; open with slots=8, or build it for more"),
        ({"cache_dtype": "float16"}, "stage 0 was built for caches of float32, not float16; leave cache_dtype out"),
        ({"quantise": "int8"}, "quantise='int8' is for onnxruntime; a TensorRT engine has the precision that it was"),
    ):
        with pytest.raises(EngineError) as caught:
            opened(decoder, **options)
        assert str(caught.value).startswith(message)
    with opened(decoder, prefill_chunk=60) as pipeline:
        with pytest.raises(EngineError, match=r"built for decode: .* prefill: .*, not for batch 1 x length 50"):
            pipeline.generate(list(range(1, 51)), max_tokens=2).result(SECONDS)
        pipeline.generate(list(range(1, 20)), max_tokens=2).result(SECONDS)


def test_stages_recut_have_no_engines_and_the_old_ones_continue(
    decoder: Path, wanted: list[tuple[int, ...]], install: Install
) -> None:
    install(FakeDriver(gpus=2))
    with opened(decoder, devices=["cuda:0", "cuda:1"]) as pipeline:
        for stages in (1, 3):
            with pytest.raises(
                EngineError, match=r"^stage \d was recut while the pipeline ran, and TensorRT engines are"
            ):
                pipeline.recut(stages)
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted


def test_caches_go_from_engine_to_engine(decoder: Path, install: Install) -> None:
    driver = FakeDriver(gpus=2)
    install(driver)
    first, second, far = open_gpus([(0, 0), (0, 0), (0, 1)], (0,), driver)
    engines = [open_tensorrt(stage_of(decoder, 0), device, CacheSize(4, 64)) for device in (first, second, far)]
    name = engines[0].output_names[0]
    after = {**rows_of([9]), "past_lengths": np.array([3])}
    engines[0].step(rows_of([4, 5, 6]), [name], 2)
    expected = engines[0].step(after, [name], 2)[name].read().wait()  # type: ignore[union-attr]
    before = driver.live_blocks
    for giver, taker in ((0, 1), (1, 2), (2, 0)):
        engines[taker].take_caches(engines[giver].give_caches())
        found = engines[taker].step(after, [name], 2)[name].read().wait()  # type: ignore[union-attr]
        np.testing.assert_array_equal(found, expected)
    assert driver.live_blocks > before  # to another GPU they were copied
    with pytest.raises(EngineError, match=r"^stage 0 received no cache "):
        engines[1].take_caches({})


def test_an_engine_for_another_gpu_is_not_opened(decoder: Path, tmp_path: Path, install: Install) -> None:
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, LOAD, target="sm120")
    install(FakeDriver())
    with pytest.raises(EngineError, match=r"was built for sm120 .*; this GPU is sm89 .*stageline build .* sm89"):
        opened(bundle)


def test_a_portable_engine_of_rtx_is_not_opened_on_a_gpu_that_rtx_does_not_support(
    decoder: Path, tmp_path: Path, install: Install
) -> None:
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    fake_tensorrt.build(bundle, LOAD, target="portable")
    install(FakeDriver())
    opened(bundle).close()
    install(FakeDriver(capability=(9, 0)))
    with pytest.raises(EngineError, match=r"this GPU is sm90 \(made-up GPU 0\), and such engines run on RTX GPUs"):
        opened(bundle)


def test_out_of_memory_for_the_caches_is_reported(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY", after=2)
    with pytest.raises(EngineError, match=r"^stage \d: no memory on cuda:0 .*; open with fewer slots"):
        opened(decoder)
    assert (driver.live_blocks, driver.live_handles) == (0, 0)


@pytest.mark.parametrize("call", ["launch", "kernel", "synchronize_event", "upload", "record"])
def test_a_gpu_that_is_lost_while_it_generates_is_one_line(call: str, decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    lost = (
        r"cuda:0 is lost after CUDA_ERROR_CONTAINED in \w+ \(first seen in stage \d\); close the pipeline and restart"
    )
    with opened(decoder) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=10).result(SECONDS)
        driver.fail(call, "CUDA_ERROR_CONTAINED", after=2)
        for _ in range(2):
            with pytest.raises(EngineError, match=lost) as caught:
                pipeline.generate([9, 8, 7], max_tokens=20).result(SECONDS)
            assert "\n" not in str(caught.value)


def test_out_of_memory_in_a_step_is_one_line_and_what_comes_later_runs(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    module = install(driver)
    batch = {"input_ids": np.ones((3, 11), np.int64)}  # needs memory that no step before it has needed
    full = r"stage \d: no memory on cuda:0 .*; open with fewer slots, a smaller capacity or smaller micro-batches$"
    with opened(decoder) as pipeline:
        first = tokens_of(pipeline.generate([3, 4, 5], max_tokens=4))
        for call in ("allocate", "allocate_host"):
            for _ in range(2):  # also after what is free was given back
                driver.fail(call, "CUDA_ERROR_OUT_OF_MEMORY")
            with pytest.raises(EngineError, match=full):
                pipeline.run(batch)
            driver._failures.clear()
            assert tokens_of(pipeline.generate([3, 4, 5], max_tokens=4)) == first
        module.refuse = "memory"
        with pytest.raises(EngineError, match=r"stage \d has no memory for another execution context in TensorRT on"):
            pipeline.run({"input_ids": np.ones((4, 7), np.int64)})
        module.refuse = ""
        assert pipeline.run(batch)["logits"].shape == (3, 11, 99)
    assert driver.live_blocks == 0


def test_tensorrt_does_not_run_on_cpus(decoder: Path) -> None:
    from stageline.runtime.devices.cpu import CpuDevice

    with pytest.raises(EngineError, match=r"^the engine tensorrt runs on cuda:N, not on cpu; open with devices="):
        open_tensorrt(stage_of(decoder, 0), CpuDevice((0,)))
    assert issubclass(TensorRTEngine, object)

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
from fake_tensorrt import FakeTensorRT
from llamas import THREE_BLOCKS
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.devices import cuda
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.engines.base import CacheSize, StageFile
from stageline.runtime.engines.tensorrt.engine import TensorRTEngine, open_tensorrt
from stageline.runtime.engines.tensorrt.flavour import Flavour
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.workload import Workload

SECONDS = 60
LOAD = Workload(micro_batch=4, length=32, slots=4, capacity=64)
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
        module = FakeTensorRT(driver)
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
            new.append(driver.count_of("allocate", "allocate_host", "new_event"))
            if new[-1] == 0:
                break
        assert new[-1] == 0, new


def test_a_stage_that_cannot_be_captured_runs_all_the_same(
    decoder: Path, wanted: list[tuple[int, ...]], install: Install
) -> None:
    driver = FakeDriver(seed=1)
    install(driver).refuse = "capture"
    with opened(decoder) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
    assert driver.count_of("launch") == 0


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
    (path,) = bundle.glob("engines/manifest.json")
    path.write_text(path.read_text().replace('"version_compatible":true', '"version_compatible":false'))
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
    assert len(driver._graphs) == len(engine._bindings) == 2  # one of them is leased to what is held
    contexts = [weakref.ref(binding.context) for binding in engine._bindings]
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
        ({"slots": 5}, "stage 0 was built for 4 slots, 5 are requested; open with slots=4, or build it for more"),
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


def test_out_of_memory_for_the_caches_is_reported(decoder: Path, install: Install) -> None:
    driver = FakeDriver()
    install(driver)
    driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY", after=2)
    with pytest.raises(EngineError, match=r"^stage \d: no memory on cuda:0 .*; open with fewer slots"):
        opened(decoder)
    assert (driver.live_blocks, driver.live_handles) == (0, 0)


def test_tensorrt_does_not_run_on_cpus(decoder: Path) -> None:
    from stageline.runtime.devices.cpu import CpuDevice

    with pytest.raises(EngineError, match=r"^the engine tensorrt runs on cuda:N, not on cpu; open with devices="):
        open_tensorrt(stage_of(decoder, 0), CpuDevice((0,)))
    assert issubclass(TensorRTEngine, object)

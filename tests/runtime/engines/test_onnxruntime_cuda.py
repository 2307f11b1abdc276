"""ONNX Runtime on fake GPUs, whose kernels are ONNX Runtime's on a CPU, through the real pipeline:
what it computes is what the CPU's pipeline computes, in whatever order the streams come to it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fake_onnxruntime
import numpy as np
import onnxruntime as ort
import pytest
from fake_cuda import FakeDriver
from llamas import THREE_BLOCKS, TIED
from stageline.models.errors import EngineError, RequestError
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines.lowering import draw_graph
from stageline.runtime.generation import sampling
from stageline.runtime.generation.request import Completion, GenerationRequest, Sampling
from stageline.runtime.generation.steps import Step
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.stages import opening

SECONDS = 60
PROMPTS = [[5, 8, 13], list(range(3, 40)), [7], [5, 8, 13, 21], list(range(60, 90))]
DEVICES = [
    ["cuda:0"],
    ["cuda:0", "cuda:1"],
    ["cuda:0", "cuda:1", "cuda:0"],
    ["cuda:0", "cpu", "cuda:1"],
    ["cpu", "cuda:0"],
]


@pytest.fixture(scope="module")
def decoder(export_once: Callable[..., Path]) -> Path:
    """A Llama of three blocks in three stages."""
    return export_once(THREE_BLOCKS, stages=3, seed=2)


@pytest.fixture(scope="module")
def wanted(decoder: Path) -> list[tuple[int, ...]]:
    """What the CPU's pipeline continues with, its caches in half precision as on GPUs."""
    with Pipeline.open(decoder, cache_dtype="float16") as pipeline:
        return [tokens_of(future) for future in submitted(pipeline)]


def submitted(pipeline: Pipeline) -> "list[Future[Completion]]":
    sampling = Sampling(max_tokens=12)
    return [pipeline.submit(GenerationRequest(tuple(prompt), sampling)) for prompt in PROMPTS]


def tokens_of(future: "Future[Completion]") -> tuple[int, ...]:
    return future.result(SECONDS).choices[0].token_ids


def on_gpus(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> Callable[..., Pipeline]:
    fake_onnxruntime.install(monkeypatch, driver)

    def begin(bundle: Path, devices: Sequence[str] = ("cuda:0",), **options: Any) -> Pipeline:
        return Pipeline.open(bundle, engine="onnxruntime-cuda", devices=devices, **options)

    return begin


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("devices", DEVICES, ids=" ".join)
def test_tokens_are_those_of_the_cpu(
    devices: list[str],
    seed: int | None,
    decoder: Path,
    wanted: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(gpus=2, reach=[(0, 1)], seed=seed)
    with on_gpus(monkeypatch, driver)(decoder, devices, slots=3, prefill_chunk=16) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted
        stats = pipeline.stats()
        assert [stage.device for stage in stats.stages] == [devices[n % len(devices)] for n in range(3)]
        assert all(stage.busy_s > 0 for stage in stats.stages)
    assert (driver.live_blocks, driver.live_handles, driver.ranges) == (0, 0, 0)


@pytest.mark.parametrize("devices", DEVICES, ids=" ".join)
def test_batches_are_those_of_the_cpu(devices: list[str], decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 99, (9, 20))
    mask = (np.arange(20) < np.random.default_rng(1).integers(1, 21, 9)[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with Pipeline.open(decoder) as pipeline:
        wanted = pipeline.run(inputs)["logits"]
    driver = FakeDriver(gpus=2, seed=5)
    with on_gpus(monkeypatch, driver)(decoder, devices) as pipeline:
        futures = [pipeline.submit(inputs) for _ in range(4)]
        for future in futures:
            found = future.result(SECONDS)["logits"]
            np.testing.assert_allclose(found[mask != 0], wanted[mask != 0], atol=0.05)
    assert driver.live_blocks == 0


MIXED = [
    Sampling(max_tokens=14),
    Sampling(max_tokens=9, temperature=1.0, seed=3),
    Sampling(max_tokens=14, temperature=0.8, top_k=5, seed=4),
    Sampling(max_tokens=11, temperature=1.2, top_p=0.9, seed=5),
    Sampling(max_tokens=14, temperature=0.9, min_p=0.1, seed=6),
    Sampling(max_tokens=6, temperature=1.0, seed=7, logprobs=2),
    Sampling(max_tokens=12, repetition_penalty=1.3),
    Sampling(max_tokens=14, stop_token_ids=(60, 16, 94, 12)),
]


@pytest.mark.parametrize("candidates", [128, 4])
def test_tokens_that_the_device_draws_are_those_that_the_host_draws(
    candidates: int, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for beside it, and where the device's candidates do not reach: then a step that was issued
    ahead had a wrong token, and is made again."""
    begin = on_gpus(monkeypatch, FakeDriver(seed=11))
    found: dict[bool, list[tuple[int, ...]]] = {}
    for module in (draw_graph, sampling):
        monkeypatch.setattr(module, "CANDIDATES", candidates)
    for draws in (True, False):
        with monkeypatch.context() as patch:
            if not draws:
                patch.setattr(opening, "open_sampler", lambda vocabulary, device: None)
            with begin(decoder, slots=4) as pipeline:
                requests = [GenerationRequest(tuple(PROMPTS[n % 5]), one) for n, one in enumerate(MIXED * 2)]
                found[draws] = [tokens_of(future) for future in [pipeline.submit(request) for request in requests]]
    assert found[True] == found[False]


def test_a_step_is_issued_before_the_host_has_read_the_last_one(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after is enqueued while the tokens are on their way. A text takes as many steps as it has tokens, and
    one more if it ended while that was under way."""
    with on_gpus(monkeypatch, FakeDriver())(decoder) as pipeline:
        generator, ahead = pipeline._generator, []
        send = generator._send

        def noted(step: Step, before: Any = None) -> None:
            ahead.append(before is not None)
            send(step, before)

        monkeypatch.setattr(generator, "_send", noted)
        whole = tokens_of(pipeline.generate([3, 4, 5], max_tokens=30).future)
        assert len(ahead) == 30
        assert sum(ahead) >= 20
        ahead.clear()
        place = max(whole.index(token) for token in whole)
        ended = tokens_of(pipeline.generate([3, 4, 5], max_tokens=30, stop_token_ids=[whole[place]]).future)
        assert ended == whole[: place + 1]
        assert len(ahead) in (place + 1, place + 2)
        assert tokens_of(pipeline.generate([3, 4, 5], max_tokens=30).future) == whole


def test_quantised_stages_are_cut_anew_on_gpus(
    export_once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_gpus(monkeypatch, FakeDriver())(export_once(TIED), quantise="int4") as pipeline:
        whole = tokens_of(pipeline.generate([3, 4, 5], max_tokens=12).future)
        pipeline.recut(2)
        assert tokens_of(pipeline.generate([3, 4, 5], max_tokens=12).future) == whole


def test_an_encoder_runs_on_a_gpu(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": np.random.default_rng(0).integers(5, 12, (4, 7))}
    with Pipeline.open(tiny_bundle) as pipeline:
        wanted = pipeline.run(inputs)["logits"]
    with on_gpus(monkeypatch, FakeDriver())(tiny_bundle) as pipeline:
        for _ in range(3):  # at once, captured, and as a replay
            error = np.abs(pipeline.run(inputs)["logits"] - wanted).max()
            assert 0 < error <= 1e-2 * np.abs(wanted).max()  # the bundle, and so what is computed, is bfloat16


def test_in_the_steady_state_a_decode_step_allocates_nothing_and_waits_once(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 60 tokens: the driver is asked for nothing new, and the host waits for one copy a token, the logits."""
    driver = FakeDriver(gpus=2)
    with on_gpus(monkeypatch, driver)(decoder, ["cuda:0", "cuda:1"], slots=1) as pipeline:
        pipeline.generate([3, 4, 5], max_tokens=10).result(SECONDS)
        steps, new = 60, []
        for _ in range(5):  # how many buffers are held at once, which the first texts find out, depends on the threads
            driver.calls.clear()
            pipeline.generate([9, 8, 7], max_tokens=steps).result(SECONDS)
            assert driver.count_of("synchronize_event") == steps
            assert driver.count_of("download") == steps * 3  # the logits, and two values that bounce between the GPUs
            assert driver.count_of("synchronize", "free", "free_host") == 0
            assert driver.count_of("kernel", "launch") >= steps * 3
            assert driver.count_of("launch") >= steps * 3 - 9  # two of each kind of step come before its replays
            new.append(driver.count_of("allocate", "allocate_host", "new_event"))
            if new[-1] == 0:
                break
        assert new[-1] == 0, new


def test_shared_beginnings_are_copied_on_the_device(
    decoder: Path, wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(seed=7)
    with on_gpus(monkeypatch, driver)(decoder, slots=3) as pipeline:
        first = pipeline.submit(GenerationRequest(tuple(PROMPTS[1]), Sampling(max_tokens=40)))
        twin = pipeline.submit(GenerationRequest(tuple(PROMPTS[1]), Sampling(max_tokens=12, n=2)))
        assert tokens_of(first)[:12] == wanted[1]
        assert {choice.token_ids for choice in twin.result(SECONDS).choices} == {wanted[1]}
    assert driver.count_of("copy") > 0


def test_a_gpu_that_is_lost_fails_what_is_under_way_and_what_comes(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(gpus=2)
    with on_gpus(monkeypatch, driver)(decoder, ["cuda:0", "cuda:1"]) as pipeline:
        pipeline.generate([3], max_tokens=2).result(SECONDS)
        driver.fail("record", "CUDA_ERROR_ILLEGAL_ADDRESS", after=30)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"cuda:\d is lost after CUDA_ERROR_ILLEGAL_ADDRESS"):
                pipeline.generate([3, 4], max_tokens=30).result(SECONDS)
        with pytest.raises(EngineError, match=r"^micro-batch 1 of \d: cuda:\d is lost"):
            pipeline.run({"input_ids": np.ones((2, 3), np.int64)})


def test_out_of_memory_in_a_step_fails_that_request_alone(
    decoder: Path, wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver()
    with on_gpus(monkeypatch, driver)(decoder) as pipeline:
        driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(EngineError, match=r"no memory on cuda:0 .*; open with fewer slots"):
            pipeline.generate(PROMPTS[1], max_tokens=3).result(SECONDS)
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted


def test_a_pipeline_that_is_closed_at_work_leaves_nothing(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    driver = FakeDriver(gpus=2, seed=2)
    pipeline = on_gpus(monkeypatch, driver)(decoder, ["cuda:0", "cuda:1", "cpu"])
    futures = submitted(pipeline)
    batch = pipeline.submit({"input_ids": np.ones((5, 9), np.int64)})
    pipeline.close()
    for future in (*futures, batch):
        try:
            future.result(SECONDS)
        except RequestError as error:
            assert "closed" in str(error)  # noqa: PT017 - some may have been done
    assert (driver.live_blocks, driver.live_handles) == (0, 0)
    assert threading.active_count() == before


def test_what_does_not_fit_is_reported_in_one_line(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = on_gpus(monkeypatch, FakeDriver())
    for options, message in (
        ({"devices": ["cuda:1"]}, "stage 0 was to run on cuda:1; this machine has cuda:0"),
        ({"devices": ["gpu"]}, "unknown device 'gpu'; devices are called cpu, cuda:0, ..., or tcp://HOST:PORT"),
        ({"devices": ["cuda:0"] * 4}, "4 devices are given for 3 stages; give 1 to 3"),
        (
            {"cache_dtype": "float32"},
            "on a GPU this bundle's caches are bfloat16, not float32; leave cache_dtype out",
        ),
    ):
        with pytest.raises((EngineError, RequestError)) as caught:
            begin(decoder, **options)
        assert str(caught.value) == message
    with pytest.raises(EngineError, match=r"^the engine onnxruntime does not run on cuda:0; engines that do: .*-cuda"):
        Pipeline.open(decoder, devices=["cuda:0"])


def test_an_onnxruntime_without_cuda_says_so(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = on_gpus(monkeypatch, FakeDriver())
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"^this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then"):
        begin(decoder)


@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:1"]], ids=" ".join)
def test_caches_move_when_stages_are_recut_while_they_run(
    devices: list[str], decoder: Path, wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(gpus=2, seed=3)
    with on_gpus(monkeypatch, driver)(decoder, devices) as pipeline:
        prompt = tuple(PROMPTS[1])
        whole = tokens_of(pipeline.submit(GenerationRequest(prompt, Sampling(max_tokens=60))))
        futures = [pipeline.submit(GenerationRequest(prompt, Sampling(max_tokens=60))) for _ in range(3)]
        for stages in (2, 3, 2):
            pipeline.recut(stages)
        assert [tokens_of(future) for future in futures] == [whole] * 3
        assert whole[:12] == wanted[1]
    assert (driver.live_blocks, driver.live_handles) == (0, 0)


def test_recut_stages_run_on_other_gpus(
    decoder: Path, wanted: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    recut(bundle, 2)
    with on_gpus(monkeypatch, FakeDriver(gpus=3))(bundle, ["cuda:2", "cuda:1"]) as pipeline:
        assert [tokens_of(future) for future in submitted(pipeline)] == wanted

"""The CUDA side on real GPUs: what the fake driver assumes that CUDA does. Run with: pytest -m gpu."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from real_gpu import FLOAT, Scale, need_gpus
from stageline.models.errors import RequestError
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.devices.cuda.arrays import CudaArray
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.gpu import Gpu
from stageline.runtime.devices.cuda.graphs import Replay
from stageline.runtime.devices.cuda.launch import Launch
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.stages.lanes import PipelineStage

pytestmark = pytest.mark.gpu

SECONDS = 60


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(-1000, 1000, shape).astype(np.float32)


def moved(device: CudaDevice, value: Any) -> CudaArray:
    """The value in a new buffer of the device."""
    with Launch(device, "move") as launch:
        target = launch.take(value.shape, FLOAT)
        launch.put(value, target, FLOAT)
        launch.begin()
        return CudaArray(device, target, value.shape, FLOAT, launch.end())


def test_gpus_are_named() -> None:
    driver = need_gpus()
    for ordinal in range(driver.count()):
        assert driver.name(ordinal)
        assert driver.capability(ordinal) >= (5, 0)


def test_values_survive_many_copies_with_many_under_way() -> None:
    driver = need_gpus()
    devices = open_gpus([(0, 0), (1, driver.count() - 1), (2, 0)], (0,), driver)
    for _ in range(20):
        given = [numbers(1 + n, 40_000 + n) for n in range(12)]
        readings = []
        for array in given:
            value: Any = array
            for device in devices:
                value = moved(device, value)
            readings.append(value.read())
            del value
        for array, reading in zip(given, readings, strict=True):
            np.testing.assert_array_equal(reading.wait(), array)
    for device in devices:
        device.close()


def test_in_the_steady_state_nothing_is_allocated() -> None:
    (device,) = open_gpus([(0, 0)], (0,), need_gpus())
    array, found = numbers(8, 1000), []
    for _ in range(100):
        np.testing.assert_array_equal(moved(device, array).read().wait(), array)
        found.append((device.gpu.memory.allocations, device.gpu.pinned.allocations, device.gpu._events.made))
    assert found[-1] == found[10]
    assert device.busy_s() > 0
    device.close()


def test_rows_of_a_cache_are_copied_in_place() -> None:
    (device,) = open_gpus([(0, 0)], (0,), need_gpus())
    slots = numbers(4, 3, 32, 16)  # slots, heads, tokens, size
    value = moved(device, slots)
    slot_bytes, token_bytes = slots[0].nbytes, 16 * 4
    of, to = (value.buffer.address + slot * slot_bytes for slot in (1, 3))
    device.gpu.driver.copy_rows(to, of, 32 * token_bytes, 7 * token_bytes, 3, device.stream)
    value.ready = device.gpu.record(device.stream)
    slots[3, :, :7] = slots[1, :, :7]
    np.testing.assert_array_equal(value.read().wait(), slots)
    device.close()


def test_a_kernel_is_captured_once_and_replayed() -> None:
    driver = need_gpus()
    (device,) = open_gpus([(0, 0)], (0,), driver)
    scale = Scale("x", "y", 1.0, 1.0, device)
    value = moved(device, numbers(1000))
    before = value.read().wait()
    replay, address = Replay(driver, device.stream), value.buffer.address
    for _ in range(50):
        replay.run("plus one", lambda: scale.enqueue(address, address, 1000))
    value.ready = device.gpu.record(device.stream)
    np.testing.assert_array_equal(value.read().wait(), before + 50)
    assert (replay.captures, replay.refused) == (1, None)
    replay.close()
    scale.close()
    device.close()


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_pipeline_of_stages_on_gpus_computes(gpus: int) -> None:
    """Three stages, and many batches running, cut into micro-batches."""
    need_gpus(gpus)
    spec = partial(TensorSpec, dtype="float32", shape=("batch", "width"))
    names = ["x", "h1", "h2", "y"]
    stages = [
        PipelineStage((reads,), (gives,), partial(Scale, reads, gives, n + 2.0, n - 1.0))
        for n, (reads, gives) in enumerate(itertools.pairwise(names))
    ]
    devices = [f"cuda:{n % gpus}" for n in range(3)]
    with Pipeline.of_stages(
        Signature((spec(name="x"),), (spec(name="y"),)), stages, micro_batch=3, devices=devices
    ) as pipeline:
        given = [numbers(1 + n % 9, 2048) for n in range(64)]
        futures = [pipeline.submit({"x": array}) for array in given]
        for array, future in zip(given, futures, strict=True):
            expected = ((array * 2 - 1) * 3) * 4 + 1
            np.testing.assert_array_equal(future.result(SECONDS)["y"], expected)
        stats = pipeline.stats()
        assert [stage.device for stage in stats.stages] == devices
        assert all(stage.busy_s > 0 for stage in stats.stages)


def test_stages_on_a_cpu_and_on_a_gpu_mix() -> None:
    need_gpus()

    class OnHost:
        input_names, output_names, max_rows = ("h",), ("y",), None
        packs, block_tokens = False, None

        def run(self, inputs: Any, outputs: Any) -> Any:
            from stageline.runtime.devices.base import on_host

            return {"y": on_host(inputs, ["h"])["h"] + 1}

        def close(self) -> None:
            pass

    spec = partial(TensorSpec, dtype="float32", shape=("batch", "width"))
    stages = [
        PipelineStage(("x",), ("h",), partial(Scale, "x", "h", 2.0, 0.0)),
        PipelineStage(("h",), ("y",), lambda device: OnHost()),  # type: ignore[arg-type,return-value]
    ]
    with Pipeline.of_stages(
        Signature((spec(name="x"),), (spec(name="y"),)), stages, devices=["cuda:0", "cpu"]
    ) as pipeline:
        array = numbers(7, 300)
        np.testing.assert_array_equal(pipeline.run({"x": array})["y"], array * 2 + 1)


def test_peers_that_are_not_reachable_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_gpus([(0, 0), (1, 1)], (0,), need_gpus(2))
    for reaches in (Gpu.reaches, lambda gpu, other: False):
        monkeypatch.setattr(Gpu, "reaches", reaches)
        array = numbers(50, 500)
        np.testing.assert_array_equal(moved(first, moved(second, array)).read().wait(), array)
    for device in (first, second):
        device.close()


def test_too_much_memory_is_an_error_that_leaves_the_gpu_usable() -> None:
    (device,) = open_gpus([(0, 0)], (0,), need_gpus())
    device.gpu.make_current()
    with pytest.raises(CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.gpu.memory.take(1 << 45)
    array = numbers(10)
    np.testing.assert_array_equal(moved(device, array).read().wait(), array)
    device.close()


def test_a_gpu_that_is_not_there_is_reported() -> None:
    driver = need_gpus()
    with pytest.raises(RequestError, match=r"this machine has cuda:0"):
        open_gpus([(0, driver.count())], (0,), driver)

"""A stage on a GPU: how values come to it and leave it, in which order, and what becomes of failures. The driver is
made up; its work is done as late as possible, or at random moments, and it raises HazardError where an order is not
safe."""

import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import KERNEL_S, FakeDriver
from stageline.models.errors import EngineError, RequestError
from stageline.runtime.devices.base import Array, Value, on_host
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.devices.cuda.arrays import CudaArray, host_view, size_bytes
from stageline.runtime.devices.cuda.device import CudaDevice
from stageline.runtime.devices.cuda.launch import Launch

FLOAT = np.dtype("float32")
DRIVERS: list[tuple[str, Callable[[], FakeDriver]]] = [
    ("late", lambda: FakeDriver(gpus=2)),
    ("late, peers", lambda: FakeDriver(gpus=2, reach=[(0, 1), (1, 0)])),
    *((f"random {seed}", lambda seed=seed: FakeDriver(gpus=2, reach=[(1, 0)], seed=seed)) for seed in range(4)),  # type: ignore[misc]
]
each_driver = pytest.mark.parametrize("make", [make for _, make in DRIVERS], ids=[name for name, _ in DRIVERS])


def plus_one(device: CudaDevice, value: Value) -> CudaArray:
    """A kernel on the device that adds one."""
    driver: Any = device.gpu.driver
    shape = value.shape
    with Launch(device, "plus one") as launch:
        given = launch.local(value, FLOAT)
        result = launch.take(shape, FLOAT)
        launch.begin()
        source, target, size = given.buffer.address, result.address, size_bytes(shape, FLOAT)

        def run() -> None:
            driver.array(target, size).view(FLOAT)[:] = driver.array(source, size).view(FLOAT) + 1

        driver.kernel(device.stream, [source], [target], run)
        done = launch.end()
    return CudaArray(device, result, shape, FLOAT, done)


def numbers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).integers(0, 1000, shape).astype(np.float32)


@each_driver
def test_values_pass_from_stage_to_stage_and_gpu_to_gpu(make: Callable[[], FakeDriver]) -> None:
    driver = make()
    devices = open_gpus([(0, 0), (1, 0), (2, 1), (3, 0)], (0,), driver)
    for step in range(12):
        value: Value = numbers(3, 50 + step % 3)
        expected = value + 4
        for device in devices:
            value = plus_one(device, value)
        np.testing.assert_array_equal(on_host({"y": value}, ["y"])["y"], expected)
    for device in devices:
        device.close()
    assert (driver.live_blocks, driver.live_handles, driver.ranges) == (0, 0, 0)


@each_driver
def test_many_values_under_way_at_once_do_not_disturb_each_other(make: Callable[[], FakeDriver]) -> None:
    devices = open_gpus([(0, 0), (1, 1)], (0,), make())
    inputs = [numbers(4, 100) for _ in range(20)]
    readings = [plus_one(devices[1], plus_one(devices[0], array)).read() for array in inputs]
    for array, reading in zip(inputs, readings, strict=True):
        np.testing.assert_array_equal(reading.wait(), array + 1 + 1)


def test_peers_that_are_not_reachable_go_through_pinned_memory() -> None:
    for reach, peer, uploads in (([(1, 0)], 1, 1), ([], 0, 2)):
        driver = FakeDriver(gpus=2, reach=reach)
        first, second = open_gpus([(0, 0), (1, 1)], (0,), driver)
        assert plus_one(second, plus_one(first, numbers(9))).read().wait().shape == (9,)
        assert driver.count_of("copy_peer") == peer
        assert driver.count_of("upload") == uploads
        assert driver.count_of("synchronize_event") == 1  # the reader's, and no other


def test_a_second_stage_waits_for_the_first_by_an_event_and_not_on_the_host() -> None:
    driver = FakeDriver()
    first, second = open_gpus([(0, 0), (1, 0)], (0,), driver)
    made = plus_one(first, numbers(5))
    driver.calls.clear()
    plus_one(second, made)
    waits = [call for call in driver.calls if call[0] == "wait"]
    assert waits == [("wait", second.stream, made.ready.handle)]
    assert [call[0] for call in driver.calls if call[0] in ("wait", "kernel")] == ["wait", "kernel"]
    assert driver.count_of("synchronize", "synchronize_event", "upload", "download", "copy") == 0


def test_in_the_steady_state_nothing_is_made_and_the_host_waits_only_to_read() -> None:
    driver = FakeDriver(gpus=2)
    first, second = open_gpus([(0, 0), (1, 1)], (0,), driver)

    def step() -> None:
        plus_one(second, plus_one(first, numbers(8, 64))).read().wait()

    for _ in range(4):
        step()
    driver.calls.clear()
    counts = []
    for _ in range(10):
        step()
        counts.append(len(driver.calls))
        driver.calls.clear()
        step()
        assert driver.count_of("synchronize_event") == 1
        assert driver.count_of("allocate", "allocate_host", "new_event", "new_stream", "synchronize", "free") == 0
        driver.calls.clear()
    assert len(set(counts)) == 1


def test_a_buffer_is_not_used_again_while_it_is_read() -> None:
    driver = FakeDriver()
    (device,) = open_gpus([(0, 0)], (0,), driver)
    reading = plus_one(device, np.zeros(100, np.float32)).read()  # the array itself is gone
    for number in range(5):
        plus_one(device, np.full(100, number, np.float32))
    np.testing.assert_array_equal(reading.wait(), np.ones(100, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_float32_in_host_memory(dtype: Any) -> None:
    (device,) = open_gpus([(0, 0)], (0,), FakeDriver())
    array = numbers(4, 7)
    with Launch(device, "upload") as launch:
        value = launch.local(array, np.dtype(dtype))
        launch.end()
    found = value.read().wait()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.astype(dtype).astype(np.float32))


def test_empty_arrays_and_other_types_come_through() -> None:
    (device,) = open_gpus([(0, 0)], (0,), FakeDriver())
    with Launch(device, "upload") as launch:
        empty = launch.local(np.zeros((3, 0, 7), np.int64), np.dtype("int64"))
        narrow = launch.local(np.arange(5), np.dtype("int32"))
        wide = launch.local(narrow, np.dtype("int64"))  # passes through the host
        launch.end()
    assert empty.read().wait().shape == (3, 0, 7)
    np.testing.assert_array_equal(wide.read().wait(), np.arange(5))


def test_busy_time_is_the_device_s_own() -> None:
    (device,) = open_gpus([(0, 0)], (0,), FakeDriver())
    assert device.busy_s() == 0
    for _ in range(7):
        plus_one(device, numbers(3)).read().wait()
    assert device.busy_s() == pytest.approx(7 * KERNEL_S)  # copies do not count


def test_a_reader_on_any_thread_gets_the_right_context() -> None:
    driver = FakeDriver(gpus=2)
    _, second = open_gpus([(0, 0), (1, 1)], (0,), driver)
    value = plus_one(second, np.zeros(3, np.float32))
    found: list[Array] = []
    thread = threading.Thread(target=lambda: found.append(on_host({"y": value}, ["y"])["y"]))
    thread.start()
    thread.join(10)
    np.testing.assert_array_equal(found[0], np.ones(3))


def test_out_of_memory_says_where_and_what_to_do_and_the_gpu_lives_on() -> None:
    driver = FakeDriver()
    (device,) = open_gpus([(5, 0)], (0,), driver)
    driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(EngineError, match=r"^stage 5: no memory on cuda:0 .*; open with fewer slots"):
        plus_one(device, numbers(3))
    assert driver.ranges == 0
    np.testing.assert_array_equal(plus_one(device, np.zeros(2, np.float32)).read().wait(), [1, 1])


def test_after_an_error_that_ends_everything_the_gpu_counts_as_lost() -> None:
    driver = FakeDriver(gpus=2)
    lost, other = open_gpus([(0, 0), (1, 1)], (0,), driver)
    value = plus_one(lost, numbers(3))
    driver.fail("synchronize_event", "CUDA_ERROR_ILLEGAL_ADDRESS")
    reading = value.read()
    with pytest.raises(EngineError, match=r"^cuda:0 is lost after CUDA_ERROR_ILLEGAL_ADDRESS in synchronize_event"):
        reading.wait()
    for attempt in (lambda: plus_one(lost, numbers(3)), value.read, lambda: plus_one(other, value)):
        with pytest.raises(EngineError, match=r"^cuda:0 is lost .*restart the process$"):
            attempt()
    plus_one(other, numbers(3)).read().wait()
    for device in (lost, other):
        device.close()
        device.close()


@pytest.mark.parametrize("call", ["upload", "wait", "record", "kernel"])
def test_a_failure_on_the_way_leaves_the_device_usable(call: str) -> None:
    driver = FakeDriver(seed=3)
    first, second = open_gpus([(0, 0), (1, 0)], (0,), driver)
    for _ in range(3):
        driver.fail(call, "CUDA_ERROR_INVALID_VALUE")
        with pytest.raises(EngineError, match=rf"^stage \d failed on cuda:0: CUDA_ERROR_INVALID_VALUE in {call}"):
            plus_one(second, plus_one(first, numbers(40)))
        array = numbers(40)
        np.testing.assert_array_equal(plus_one(second, plus_one(first, array)).read().wait(), array + 1 + 1)
    assert driver.ranges == 0


def test_a_gpu_that_is_not_there_is_a_request_error() -> None:
    with pytest.raises(RequestError, match=r"^stage 1 was to run on cuda:2; this machine has cuda:0, cuda:1$"):
        open_gpus([(0, 0), (1, 2)], (0,), FakeDriver(gpus=2))


def test_a_gpu_that_does_not_open_gives_back_the_others() -> None:
    driver = FakeDriver(gpus=2)
    driver.fail("retain", "CUDA_ERROR_DEVICE_UNAVAILABLE", after=1)
    with pytest.raises(EngineError, match=r"^cuda:1 cannot be used: CUDA_ERROR_DEVICE_UNAVAILABLE"):
        open_gpus([(0, 0), (1, 1)], (0,), driver)
    assert driver.live_handles == 0


def test_host_views_are_the_memory_itself() -> None:
    memory = np.arange(6, dtype=np.float32)
    view = host_view(memory.ctypes.data, (2, 3), FLOAT)
    view[1, 2] = 9
    assert memory[5] == 9

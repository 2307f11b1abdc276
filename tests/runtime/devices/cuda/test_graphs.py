"""Graphs: run once, captured once, replayed from then on; again for other work; never if capture is refused."""

import numpy as np
import pytest
from fake_cuda import FakeDriver
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.graphs import Replay


class Adder:
    """Work that adds one to a number on GPU 0."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.driver.make_current(self.driver.retain(0))
        self.stream, self.address = self.driver.new_stream(), self.driver.allocate(256)
        self.driver.zero(self.address, 256, self.stream)
        self.enqueued = 0

    def enqueue(self) -> None:
        self.enqueued += 1

        def add() -> None:
            self.driver.array(self.address, 8).view(np.int64)[0] += 1

        self.driver.kernel(self.stream, [self.address], [self.address], add)

    @property
    def sum(self) -> int:
        self.driver.synchronize(self.stream)
        return int(self.driver.array(self.address, 8).view(np.int64)[0])


def test_work_is_captured_the_second_time_and_replayed_from_then_on() -> None:
    work = Adder()
    replay = Replay(work.driver, work.stream)
    for _ in range(10):
        replay.run("decode 8", work.enqueue)
    assert work.sum == 10
    assert work.enqueued == 2  # once as it is, once into the graph
    assert (replay.captures, work.driver.count_of("launch")) == (1, 9)


def test_other_addresses_or_shapes_start_over() -> None:
    work = Adder()
    replay = Replay(work.driver, work.stream)
    for key in ("a", "a", "a", "b", "b", "b", "a"):
        replay.run(key, work.enqueue)
    assert work.sum == 7
    assert replay.captures == 2
    assert work.driver.count_of("destroy_graph") == 2
    replay.close()
    replay.close()
    assert work.driver.count_of("begin_capture") == work.driver.count_of("end_capture") == 2


@pytest.mark.parametrize("call", ["kernel", "end_capture"])
def test_what_cannot_be_captured_is_enqueued_each_time(call: str) -> None:
    work = Adder()
    replay = Replay(work.driver, work.stream)
    replay.run("a", work.enqueue)
    for number in range(3):  # a kernel runs between two captures as well
        work.driver.fail(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", number if call == "kernel" else 0)
    for _ in range(6):
        replay.run("a", work.enqueue)
    assert work.sum == 7
    assert replay.captures == 0
    assert "CUDA_ERROR_STREAM_CAPTURE" in (replay.refused or "")
    assert work.driver.count_of("begin_capture") == 3


def test_what_allocated_once_more_is_captured_the_next_time() -> None:
    work = Adder()
    replay = Replay(work.driver, work.stream)
    replay.run("a", work.enqueue)
    work.driver.fail("end_capture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
    for _ in range(3):
        replay.run("a", work.enqueue)
    assert work.sum == 4
    assert (replay.captures, replay.refused) == (1, None)


def test_a_lost_gpu_is_reported_at_once() -> None:
    work = Adder()
    replay = Replay(work.driver, work.stream)
    replay.run("a", work.enqueue)
    work.driver.fail("end_capture", "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        replay.run("a", work.enqueue)
